"""What an export promises can be checked: the damaged file is named by every verb, in one line."""

import shutil
import subprocess

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from kanlm.checksums import verify
from kanlm.config import UserError
from kanlm.data.tokenizer import loaded_tokenizer, trained_tokenizer
from kanlm.evaluation.generation import generate
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import evaluate
from kanlm.export import export_model, update_card
from kanlm.interpret.inspect import inspect
from kanlm.model import KanLMConfig, KanLMForCausalLM


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = KanLMForCausalLM(KanLMConfig(vocab_size=270, max_position_embeddings=32, **sizes))
    tokenizer = trained_tokenizer(iter(["the cat sat on the mat " * 9]), 270)
    return export_model(model, tokenizer, tmp_path_factory.mktemp("export") / "small", {"name": "small"})


@pytest.fixture
def in_hub_cache(exported, tmp_path, monkeypatch):
    """Where the hub's cache keeps the export as me/small, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--me--small"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("c" * 40)
    return shutil.copytree(exported, place / "snapshots" / ("c" * 40))


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_an_export_is_whole_and_its_files_have_one_mode(folder):
    assert verify(folder)
    update_card(folder, [])
    assert verify(folder)  # the card is no part of it
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS", "README.md"}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this machine")
def test_sha256sum_reads_the_file(folder):
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    (folder / "ffn.py").write_text("pass\n")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_kanlm.py", "tokenizer.json", "config.json"])
def test_a_flipped_bit_is_named(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    for use in (
        load_causal_lm,
        lambda model: evaluate(model, ["the cat"], "text", "test"),
        lambda model: generate(model, "the cat", max_new_tokens=2),
        lambda model: inspect(model, folder / "out"),
    ):
        with pytest.raises(UserError, match=f"^{folder / name}: (damaged or changed|not )"):
            use(folder)


def test_a_model_of_the_hub_is_checked_in_the_cache(in_hub_cache):
    (in_hub_cache / "ffn.py").unlink()  # not downloaded, as the installed classes serve
    assert load_causal_lm("me/small")[0].config.model_type == "kanlm"
    weights = in_hub_cache / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=f"^{weights}: damaged or changed"):
        load_causal_lm("me/small")
    (in_hub_cache / "SHA256SUMS").write_text("0" * 64 + "  ../../elsewhere\n")
    with pytest.raises(UserError, match="SHA256SUMS: damaged"):
        load_causal_lm("me/small")


def test_a_model_of_the_hub_that_is_not_there_is_one_line(in_hub_cache):
    with pytest.raises(UserError, match="^model me/other: neither a model folder nor a reachable hub id"):
        load_causal_lm("me/other")


def test_a_missing_file_and_a_damaged_list_are_named(folder):
    (folder / "kan.py").rename(folder / "other.py")
    with pytest.raises(UserError, match="kan.py: missing"):
        verify(folder)
    (folder / "SHA256SUMS").write_text("0" * 64 + "  ../elsewhere\n")
    with pytest.raises(UserError, match="SHA256SUMS: damaged"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_truncated_file_is_named_without_checksums_too(folder, name, share):
    (folder / "SHA256SUMS").unlink()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=f"^{folder / name}: not [^\n]*; copy or export it again$"):
        load_causal_lm(folder)


def test_a_tokenizer_that_is_none_is_named(folder):
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=f"{folder}/tokenizer.json: not a tokenizer"):
        loaded_tokenizer(folder)


def test_weights_of_another_model_are_one_line(folder):
    (folder / "SHA256SUMS").unlink()
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        load_causal_lm(folder)
