"""Token caches: exact, shared, resumed, and never trusted when something differs."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from sample_data import sample_texts, write_jsonl

from kanlm.config import SourceConfig, UserError
from kanlm.data import cache as cache_module
from kanlm.data import documents, packing, token_cache, tokenizer_for, train_caches
from kanlm.data.cache import TokenCache, ensure_cache
from kanlm.data.corpus import TextStream, split_sources
from kanlm.data.packing import Packer
from kanlm.data.sources import Unreachable
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.metrics import TextCounts, total_counts


def test_cache_holds_every_document_after_an_eos(jsonl, config_for):
    config = config_for(jsonl, validation_fraction=0.2)
    tokenizer = tokenizer_for(config)
    for split in ("train", "validation"):
        cache = token_cache(config, tokenizer, split)
        texts = list(documents(config.data, split))
        bounds = [*cache.document_starts.tolist(), len(cache)]
        stored = [cache.tokens(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
        assert all(
            ids[0] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[1:] for ids in stored
        )
        assert [tokenizer.decode(ids[1:].tolist()) for ids in stored] == texts
        counts = total_counts(texts)
        for name in ("bytes", "words", "documents"):
            assert cache.manifest[name] == getattr(counts, name)
        assert cache.manifest["tokens"] == len(cache) == cache.manifest["text_tokens"] + len(texts)


def test_cache_is_built_once(jsonl, config_for, monkeypatch):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    first = token_cache(config, tokenizer, "train")
    monkeypatch.setattr(cache_module, "Packer", None)  # a second build would fail
    assert token_cache(config, tokenizer, "train").folder == first.folder


def test_cache_follows_text_and_tokenizer(jsonl, texts, config_for):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    before = token_cache(config, tokenizer, "train")
    other = tokenizer_for(config_for(jsonl, vocab_size=300))
    assert token_cache(config, other, "train").folder != before.folder
    write_jsonl(jsonl, [*texts, "more text"])
    after = token_cache(config, tokenizer, "train")
    assert after.folder != before.folder and after.manifest["sha256"] != before.manifest["sha256"]


def shards_of(config, tokenizer, shard_characters, monkeypatch, batch_characters=500):
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch_characters)
    return ensure_cache(split_sources(config.data, "train"), config, tokenizer, "train", shard_characters)


def test_shards_and_processes_do_not_change_the_tokens(jsonl, tmp_path, config_for, monkeypatch):
    tokenizer = tokenizer_for(config_for(jsonl))
    whole = token_cache(config_for(jsonl), tokenizer, "train")
    sharded = shards_of(config_for(jsonl, cache_dir=str(tmp_path / "b")), tokenizer, 6000, monkeypatch)
    spread = shards_of(
        config_for(jsonl, cache_dir=str(tmp_path / "c"), num_workers=2), tokenizer, 6000, monkeypatch
    )
    assert len(whole.manifest["shards"]) == 1 and len(sharded.manifest["shards"]) > 5
    everything = whole.tokens(0, len(whole))
    for other in (sharded, spread):
        assert other.manifest["sha256"] == whole.manifest["sha256"]
        assert np.array_equal(other.document_starts, whole.document_starts)
        for start, stop in ((0, len(whole)), (1990, 6100), (len(whole) - 1, len(whole)), (0, 1)):
            assert np.array_equal(other.tokens(start, stop), everything[start:stop])


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_largest_id_comes_back_whatever_the_dtype(tmp_path, config_for, vocab_size, dtype):
    tokenizer = trained_tokenizer(iter(sample_texts(50)), 300)
    tokenizer.add_tokens([f"<{n}>" for n in range(vocab_size - len(tokenizer))])
    last = tokenizer.convert_ids_to_tokens(vocab_size - 1)
    write_jsonl(tmp_path / "last.jsonl", [f"plain {last}"] * 200)
    cache = token_cache(config_for(tmp_path / "last.jsonl", validation_fraction=1e-9), tokenizer, "train")
    assert len(tokenizer) == vocab_size and cache.manifest["dtype"] == dtype
    assert cache.tokens(len(cache) - 1, len(cache)).tolist() == [vocab_size - 1]


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "documents"])
def test_file_of_the_wrong_size_is_named(jsonl, config_for, change):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    folder = token_cache(config, tokenizer, "train").folder
    path = folder / ("documents.bin" if change == "documents" else "shard-00000.bin")
    if change == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content + b"\0\0" if change == "longer" else content[:-2])
    with pytest.raises(
        UserError, match=f"{path.name}: (is missing|has .* bytes), but its manifest says .*delete"
    ):
        token_cache(config, tokenizer, "train")


def test_manifest_of_other_data_is_refused(jsonl, config_for):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    path = token_cache(config, tokenizer, "train").folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_sha256": "another"}))
    with pytest.raises(UserError, match="made of other data .tokenizer_sha256 differs."):
        token_cache(config, tokenizer, "train")


def test_empty_corpus_and_empty_holdout_leave_nothing_behind(tmp_path, config_for, jsonl):
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    tokenizer = tokenizer_for(config_for(jsonl))
    with pytest.raises(UserError, match="data.source: .*blank.jsonl' is empty: it holds no text"):
        token_cache(config_for(tmp_path / "blank.jsonl"), tokenizer, "train")
    with pytest.raises(UserError, match="data.source: .*blank.jsonl' is empty: it holds no text"):
        tokenizer_for(config_for(tmp_path / "blank.jsonl"))
    with pytest.raises(UserError, match="data.validation_fraction: no text .* is held out"):
        token_cache(config_for(jsonl, validation_fraction=1e-9), tokenizer, "validation")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.suffix != ".lock"]


def test_mistake_in_the_text_leaves_nothing_behind(tmp_path, jsonl, texts, config_for):
    tokenizer = tokenizer_for(config_for(jsonl))
    content = jsonl.read_bytes()
    jsonl.write_bytes(content[:-10] + b"\xff" + content[-10:])
    with pytest.raises(UserError, match=f"texts.jsonl', byte {len(content) - 10}: not UTF-8"):
        token_cache(config_for(jsonl), tokenizer, "train")
    tokens = tmp_path / "cache" / "tokens"
    assert not tokens.exists() or not [path for path in tokens.iterdir() if path.suffix != ".lock"]


def test_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, jsonl, config_for, monkeypatch):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "fsync_folder", full)
    with pytest.raises(UserError, match="data.cache_dir: no space left"):
        token_cache(config, tokenizer, "train")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.suffix != ".lock"]
    monkeypatch.undo()
    assert len(token_cache(config, tokenizer, "train"))


def test_mixture_has_a_cache_for_each_source_and_one_for_validation(jsonl, config_for):
    mixture = (SourceConfig(source=str(jsonl)), SourceConfig(source="stories"))
    config = config_for(mixture=mixture, max_documents=150, validation_fraction=0.2)
    tokenizer = tokenizer_for(config)
    first, second = train_caches(config, tokenizer)
    held_out = token_cache(config, tokenizer, "validation")
    assert (first.manifest["source"], second.manifest["source"]) == (str(jsonl), "stories")
    assert held_out.manifest["documents"] + first.manifest["documents"] + second.manifest["documents"] == 300
    assert held_out.manifest["bytes"] == total_counts(documents(config.data, "validation")).bytes


BUILDER = """
import json, sys, time
from kanlm.config import RunConfig
from kanlm.data import packing, tokenizer_for
from kanlm.data.cache import _Shard, ensure_cache
from kanlm.data.corpus import split_sources
config = RunConfig.model_validate_json(sys.argv[1])
packing.BATCH_CHARACTERS = 500
keep = _Shard.keep
def slowly_kept(self):
    keep(self)
    print("shard", flush=True)
    time.sleep(float(sys.argv[2]))
_Shard.keep = slowly_kept
cache = ensure_cache(split_sources(config.data, "train"), config, tokenizer_for(config), "train", 6000)
print(json.dumps(cache.manifest))
"""


def builder(config, pause):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILDER, config.model_dump_json(), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_killed_build_resumes_and_two_builders_share_one_build(jsonl, tmp_path, config_for, monkeypatch):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    reference = shards_of(config_for(jsonl, cache_dir=str(tmp_path / "other")), tokenizer, 6000, monkeypatch)

    killed = builder(config, pause=0.5)
    for _ in range(3):
        assert killed.stdout.readline() == "shard\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (partial,) = (tmp_path / "cache" / "tokens").glob("train-*.partial")
    first_shard = partial / "shard-00000.bin"
    written = first_shard.stat().st_mtime_ns
    # What a kill in the middle of a write leaves: a torn shard, and one without its record.
    (partial / ".shard-00003.bin.1").write_bytes(b"torn")
    (partial / "shard-00003.bin").write_bytes(b"torn")
    (partial / "shard-00003.starts").write_bytes(b"\7" * 20)

    damaged = config_for(jsonl, cache_dir=str(tmp_path / "damaged"))
    shutil.copytree(tmp_path / "cache", tmp_path / "damaged")
    (shard,) = (tmp_path / "damaged" / "tokens").glob("*.partial/shard-00000.bin")
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="shard-00000.bin: damaged"):
        token_cache(damaged, tokenizer, "train")

    both = [builder(config, pause=0.01) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    manifests = [json.loads(lines[-1]) for lines in outputs]
    assert manifests[0] == manifests[1]
    built = sorted(lines.count("shard") for lines in outputs)
    assert built == [0, len(reference.manifest["shards"]) - 3]
    for name in ("sha256", "tokens", "bytes", "words", "documents", "shards"):
        assert manifests[0][name] == reference.manifest[name]
    (folder,) = [path for path in partial.parent.iterdir() if path.is_dir()]
    assert (folder / "shard-00000.bin").stat().st_mtime_ns == written
    assert np.array_equal(TokenCache(folder).document_starts, reference.document_starts)


@pytest.mark.parametrize("name", ["shard-00000.bin", "documents.bin"])
def test_flipped_bit_of_a_small_cache_is_named(jsonl, config_for, name):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    folder = token_cache(config, tokenizer, "train").folder
    content = bytearray((folder / name).read_bytes())
    content[9] ^= 64
    (folder / name).write_bytes(content)
    with pytest.raises(
        UserError, match=f"{name}: damaged .sha256 differs from manifest.json.; delete {folder}"
    ):
        token_cache(config, tokenizer, "train")


@pytest.mark.parametrize("batch_characters", [30, 1000, 1 << 30])
def test_documents_longer_than_a_batch_are_packed_whole(monkeypatch, batch_characters):
    texts = sample_texts(40)
    texts[7:7] = [" ".join(sample_texts(90)), "x", " ".join(sample_texts(50, seed=1))]
    tokenizer = trained_tokenizer(iter(texts), 400)
    monkeypatch.setattr(packing, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch_characters)
    packer = Packer(tokenizer)
    parts = list(packer.pack(packer.fragments(texts)))
    assert sum((part.counts for part in parts), TextCounts()) == total_counts(texts)
    documents = []
    for part in parts:
        assert part.lengths.sum() == len(part.ids)
        documents += np.split(part.ids.astype(int), np.cumsum(part.lengths)[:-1])
    assert [ids[0] for ids in documents] == [tokenizer.eos_token_id] * len(texts)
    assert [ids[1:].tolist() for ids in documents] == [tokenizer(text)["input_ids"] for text in texts]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_setting_of_the_tokenizers_library_is_given_back(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    packer = Packer(trained_tokenizer(iter(sample_texts(50)), 300))
    packed = packer.pack(packer.fragments(sample_texts(5)))
    next(packed)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    packed.close()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_terminal_gets_a_bar_while_a_cache_is_built(jsonl, config_for, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    token_cache(config, tokenizer, "train")
    assert "packing train text" in terminal.getvalue()


def test_hub_that_goes_away_costs_no_shard(jsonl, tmp_path, config_for, monkeypatch):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    reference = shards_of(config_for(jsonl, cache_dir=str(tmp_path / "other")), tokenizer, 6000, monkeypatch)

    def cut_off(source):
        for number, text in enumerate(TextStream(source)):
            if number == reference.manifest["documents"] // 2:
                raise Unreachable("data.source: the hub cannot be reached")
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "TextStream", cut_off)
        with pytest.raises(Unreachable):
            shards_of(config, tokenizer, 6000, monkeypatch)
    (partial,) = (tmp_path / "cache" / "tokens").glob("train-*.partial")
    written = (partial / "shard-00000.bin").stat().st_mtime_ns
    again = shards_of(config, tokenizer, 6000, monkeypatch)
    assert again.manifest == reference.manifest
    assert (again.folder / "shard-00000.bin").stat().st_mtime_ns == written


def test_worker_that_is_killed_is_one_line_and_costs_no_shard(jsonl, tmp_path, config_for, monkeypatch):
    config = config_for(jsonl, num_workers=2)
    tokenizer = tokenizer_for(config)
    packed = Packer.pack

    def killed(packer, fragments, num_workers):
        shards = 0
        for part in packed(packer, fragments):
            yield part
            shards += part.ends_shard
            if shards == 2:
                raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(Packer, "pack", killed)
    with pytest.raises(UserError, match="data.num_workers: .* want of memory.* again with fewer"):
        shards_of(config, tokenizer, 6000, monkeypatch)
    (partial,) = (tmp_path / "cache" / "tokens").glob("train-*.partial")
    assert list(partial.glob("shard-*.bin"))


def test_build_killed_before_its_last_rename_is_finished(jsonl, tmp_path, config_for, monkeypatch):
    """The shards stay, whichever of the last steps was not taken."""
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            shards_of(config, tokenizer, 6000, monkeypatch)
    (partial,) = (tmp_path / "cache" / "tokens").glob("train-*.partial")
    written = [path.stat().st_mtime_ns for path in sorted(partial.glob("shard-*.bin"))]
    cache = shards_of(config, tokenizer, 6000, monkeypatch)
    assert [path.stat().st_mtime_ns for path in sorted(cache.folder.glob("shard-*"))] == written
    assert {path.suffix for path in cache.folder.glob("shard-*")} == {".bin"}


def test_last_rename_is_on_disk_and_other_builds_are_left_alone(jsonl, config_for, monkeypatch):
    config = config_for(jsonl)
    tokenizer = tokenizer_for(config)
    tokens = Path(config.data.cache_dir) / "tokens"
    other = tokens / "train-other.partial"
    other.mkdir(parents=True)
    (other / ".progress.json.x").symlink_to("gone")  # like a temporary file that another build has renamed
    done = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(cache_module.os, "rename", lambda *paths: (rename(*paths), done.append("renamed")))
    monkeypatch.setattr(
        cache_module.os, "fsync", lambda number: (fsync(number), done.append(os.fstat(number).st_ino))
    )
    token_cache(config, tokenizer, "train")
    assert done[done.index("renamed") :] == ["renamed", tokens.stat().st_ino]
