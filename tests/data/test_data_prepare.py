"""`kanlm tokenize`: shares make the cache of one machine, and a published cache serves without its text."""

import json
import sys

import fsspec
import numpy as np
import pytest
import torch
from sample_data import sample_texts, write_jsonl

from kanlm.config import SourceConfig, UserError
from kanlm.data import TokenLoader, packing, prepare, remote, token_cache, tokenizer_for, train_caches
from kanlm.data import cache as cache_module
from kanlm.data.prepare import parsed_share, tokenize
from kanlm.data.tokenizer import beginning, sample

SHARES = ("2/3", "1/3", "3/3")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_CHARACTERS", 6000)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 500)


def lines(config, shard=None, push=None, workers=None):
    return list(tokenize(config, workers, shard, push))


def test_shares_of_three_machines_make_the_cache_of_one(jsonl, tmp_path, config_for):
    alone = config_for(jsonl, cache_dir=str(tmp_path / "alone"))
    lines(alone)
    config = config_for(jsonl)
    *unfinished, last = [lines(config, share) for share in SHARES]
    assert all("shards of others are missing" in told[0] for told in unfinished)
    assert last[0].startswith("train: ") and unfinished[1][1].startswith("validation: ")
    tokenizer = tokenizer_for(config)
    for made, expected in zip(
        (*train_caches(config, tokenizer), token_cache(config, tokenizer, "validation")),
        (*train_caches(alone, tokenizer), token_cache(alone, tokenizer, "validation")),
        strict=True,
    ):
        assert made.manifest == expected.manifest and len(made.manifest["shards"]) >= 1
        assert np.array_equal(made.document_starts, expected.document_starts)
    assert len(train_caches(config, tokenizer)[0].manifest["shards"]) > 5
    assert lines(config, "1/3") == [last[0], unfinished[1][1]]  # nothing is left to do


def test_share_that_is_done_is_not_packed_again_and_the_rest_of_a_single_build_is(
    jsonl, config_for, monkeypatch
):
    config = config_for(jsonl)
    lines(config, "1/2")
    kept = []
    real = cache_module._Shard.keep
    monkeypatch.setattr(cache_module._Shard, "keep", lambda self: (kept.append(self.name), real(self)))
    lines(config, "1/2")
    assert kept == []
    lines(config)
    numbers = [int(name.removeprefix("shard-")) for name in kept]
    assert numbers == list(range(1, 2 * len(numbers), 2))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "starts", "other text"])
def test_damaged_share_is_named(jsonl, tmp_path, config_for, damage):
    config = config_for(jsonl)
    lines(config, "1/2")
    (partial,) = (tmp_path / "cache" / "tokens").glob("train-*.partial")
    shard = partial / "shard-00000.bin"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif damage == "flipped":
        shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    elif damage == "starts":
        (partial / "shard-00000.starts").write_bytes(b"")
    else:
        record = json.loads((partial / "shard-00000.json").read_text())
        (partial / "shard-00000.json").write_text(json.dumps(record | {"key": "another"}))
    with pytest.raises(UserError, match=r"shard-00000.(bin: damaged|json: of another tokenizer)"):
        lines(config, "2/2")
    assert partial.is_dir()  # nothing of the others is thrown away


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/2/3", "-1/3"])
def test_share_out_of_range_is_one_line(text):
    with pytest.raises(UserError, match="--shard: expected I/N with 1 <= I <= N"):
        parsed_share(text)


def test_settings_that_make_no_cache_are_one_line(jsonl, config_for):
    with pytest.raises(UserError, match="--push: takes whole caches"):
        lines(config_for(jsonl), "1/2", "memory://x")
    with pytest.raises(UserError, match="data.streaming: true reads no token cache"):
        lines(config_for(jsonl, streaming=True))
    with pytest.raises(ValueError, match="streaming = true reads no token cache, and cache_url names one"):
        config_for(jsonl, streaming=True, cache_url="memory://x")


@pytest.mark.parametrize("place", ["memory://kanlm-published", "file://{}/published"])
def test_published_tokens_train_alike_on_a_machine_without_the_text(jsonl, tmp_path, config_for, place):
    url = place.format(tmp_path)
    config = config_for(jsonl)
    assert lines(config, push=url)[-1].startswith(f"pushed: {url}/recipes/")
    tokenizer = tokenizer_for(config)
    expected = [next(iter(TokenLoader(config, tokenizer)))["input_ids"] for _ in range(2)]
    jsonl.unlink()
    away = config_for(jsonl, cache_dir=str(tmp_path / "away"), cache_url=url)
    again = tokenizer_for(away)
    assert again.get_vocab() == tokenizer.get_vocab()
    loader = TokenLoader(away, again)
    assert torch.equal(next(iter(loader))["input_ids"], expected[0])
    assert len(token_cache(away, again, "validation"))
    system, root = fsspec.url_to_fs(url)
    system.rm(root, recursive=True)
    assert len(token_cache(away, tokenizer_for(away), "validation"))  # copied once


def test_published_shard_that_is_damaged_or_missing_is_named(jsonl, tmp_path, config_for):
    config, url = config_for(jsonl), "memory://kanlm-damaged"
    lines(config, push=url)
    system, root = fsspec.url_to_fs(url)
    shard = next(path for path in system.find(root) if path.endswith("shard-00001.bin"))
    content = system.cat_file(shard)
    away = config_for(jsonl, cache_dir=str(tmp_path / "away"), cache_url=url)
    for damaged in (content[:-2], b"\xff" + content[1:]):
        system.pipe_file(shard, damaged)
        with pytest.raises(UserError, match="shard-00001.bin: damaged .* publish it again"):
            tokenizer_for(away)
    system.rm_file(shard)
    with pytest.raises(UserError, match="shard-00001.bin: missing, but listed"):
        tokenizer_for(away)
    system.pipe_file(shard, content)
    assert len(tokenizer_for(away))


def test_place_that_holds_nothing_or_has_no_driver_is_one_line(jsonl, tmp_path, config_for, monkeypatch):
    for url, message in (
        ("memory://kanlm-nothing", "holds no tokens of this .data. and .tokenizer. .*kanlm tokenize CONFIG"),
        ("abc://bucket/folder", "data.cache_url: 'abc://bucket/folder' cannot be read: Protocol not known"),
        ("s3://bucket/folder", "data.cache_url: 's3://bucket/folder' needs a driver: .*s3fs"),
    ):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(UserError, match=message) as caught:
            tokenizer_for(config_for(jsonl, cache_url=url))
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--push: .* cannot be written: .*Not a directory"):
        lines(config_for(jsonl), push=f"{tmp_path}/file")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("abc://bucket", "--push: 'abc://bucket' cannot be written: Protocol not known"),
        ("s3://bucket/folder", "--push: 's3://bucket/folder' needs a driver: .*s3fs"),
        ("hf://datasets/owner", "--push: .* names no repository; write hf://datasets/OWNER/NAME"),
    ],
)
def test_place_to_push_to_is_looked_at_before_anything_is_tokenised(
    jsonl, config_for, monkeypatch, url, message
):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(prepare, "tokenizer_for", lambda config: pytest.fail("tokenised"))
    with pytest.raises(UserError, match=message):
        lines(config_for(jsonl), push=url)


def test_hub_repository_gets_one_commit(jsonl, config_for, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings))

        def create_commit(self, name, operations, **settings):
            calls.append((name, sorted(operation.path_in_repo for operation in operations), settings))

    monkeypatch.setattr(remote, "HfApi", Hub)
    lines(config_for(jsonl), push="hf://datasets/owner/name/tiny")
    (created, committed) = calls
    assert created == ("owner/name", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert committed[0] == "owner/name" and committed[2]["repo_type"] == "dataset"
    assert sum("/manifest.json" in path for path in committed[1]) == 2
    assert all(path.startswith("tiny/") for path in committed[1])


def test_sample_is_all_of_a_short_text_and_spread_over_a_long_one():
    texts = sample_texts(300)
    assert list(sample(iter(texts), 10**9)) == texts
    size = sum(map(len, texts))
    drawn = list(sample(iter(texts), size // 4))
    places = [texts.index(text) for text in drawn]
    assert 0.2 * size < sum(map(len, drawn)) <= size // 4
    assert places == sorted(places) and places[0] < 30 and places[-1] > 270
    assert list(sample(iter(texts), size // 4)) == drawn != list(sample(iter(texts), size // 4, seed=1))
    assert sum(map(len, sample(iter(["x y " * 100_000]), 50_000))) <= 50_000
    assert "".join(beginning(iter(texts), 1000)) == "".join(texts)[:1000]


def test_mixture_is_packed_in_shares(jsonl, tmp_path, texts, config_for):
    write_jsonl(tmp_path / "other.jsonl", texts[:120])
    mixture = (SourceConfig(source=str(jsonl)), SourceConfig(source=str(tmp_path / "other.jsonl")))
    config = config_for(mixture=mixture)
    told = [lines(config, share) for share in ("1/2", "2/2")]
    assert [line.split(":")[0] for line in told[1]] == ["train", "train"]
    assert [len(cache) > 0 for cache in train_caches(config, tokenizer_for(config))] == [True, True]
