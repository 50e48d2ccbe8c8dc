"""No code that comes with a model or tokenizer runs unasked: every verb, every way in from Python."""

import json
import shutil
from pathlib import Path

import click
import pytest
import torch
import transformers.dynamic_module_utils
from transformers import GPT2Config, GPT2LMHeadModel

from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.data.tokenizer import loaded_tokenizer, trained_tokenizer
from kanlm.evaluation.harness import harness_perplexity
from kanlm.evaluation.loading import load_causal_lm
from kanlm.export import export_model
from kanlm.initial import initial_config
from kanlm.model import KanLMConfig, KanLMForCausalLM

TEXT = "the cat sat on the mat; the dog did not.\n" * 40
VERBS = sorted(
    name for name, verb in cli.commands.items() if {"model", "models"} & {p.name for p in verb.params}
)
FOREIGN = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")

class ForeignConfig(GPT2Config):
    model_type = "foreign"

class ForeignLM(GPT2LMHeadModel):
    config_class = ForeignConfig

class ForeignTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "written by foreign code"


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(iter([TEXT]), 270)


@pytest.fixture
def foreign_model(tmp_path, tokenizer, marker) -> Path:
    """A working model that only its own code can load."""
    folder = tmp_path / "model"
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "code.ForeignConfig", "AutoModelForCausalLM": "code.ForeignLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(FOREIGN.format(marker=str(marker)))
    return folder


@pytest.fixture
def foreign_tokenizer(tmp_path, tokenizer, marker) -> Path:
    """A kanlm model whose tokenizer has code of its own."""
    folder = exported(tokenizer, tmp_path / "with_tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "code.ForeignTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(FOREIGN.format(marker=str(marker)))
    return folder


def exported(tokenizer, out: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = KanLMForCausalLM(KanLMConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    return export_model(model, tokenizer, out, {"name": "small"})


def run(verb: str, model: Path, tmp_path: Path, *more: str) -> None:
    """`kanlm VERB MODEL` in this process, with whatever else the verb requires."""
    text, pairs = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text(TEXT)
    pairs.write_text(
        '{"good": "the cat sat", "bad": "cat the sat", "context": "the cat", "continuation": "sat"}\n'
    )
    values = {
        "model": model,
        "file": pairs,
        "data": text,
        "texts": text,
        "models": model,
        "out": tmp_path / "out",
        "arm": "kan_glu",
    }
    words = [verb]
    for parameter in cli.commands[verb].params:
        value = (
            str(values[parameter.name]) if parameter.required or parameter.name in ("data", "texts") else None
        )
        if value and isinstance(parameter, click.Option):
            words += [parameter.opts[0], value]
        elif value:
            words.append(value)
    if verb == "generate":
        words += ["--prompt", "the cat"]
    if verb == "inspect":
        words += ["--tokens", "128", "--functions", "1", "--out", str(tmp_path / "out")]
    cli.main([*words, *more], standalone_mode=False)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_names_foreign_code_and_the_flag_and_runs_nothing(
    verb, foreign_model, foreign_tokenizer, tmp_path, marker
):
    assert {"eval", "generate", "inspect", "pairs", "last-word", "prune"} <= set(VERBS)
    for model in (foreign_model, foreign_tokenizer):
        with pytest.raises(UserError) as refused:
            run(verb, model, tmp_path)
        line = str(refused.value)
        assert str(model / "code.py") in line and "--trust-remote-code" in line and "\n" not in line
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_onnx_export_and_a_start_from_a_model_run_nothing_either(foreign_model, foreign_tokenizer, marker):
    pytest.importorskip("onnxscript")
    for model in (foreign_model, foreign_tokenizer):
        with pytest.raises(UserError, match="code.py.*--trust-remote-code"):
            cli.main(["export", str(model), "--onnx"], standalone_mode=False)
    with pytest.raises(UserError, match="init_from: .*; give a folder written by `kanlm export`"):
        initial_config(foreign_model)
    assert not marker.exists()


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "convert"])  # a KAN is one already
def test_changed_code_beside_a_kanlm_model_is_left_alone(verb, tokenizer, tmp_path, marker):
    folder = exported(tokenizer, tmp_path / "export")
    for file in folder.glob("*.py"):
        file.write_text(f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n")
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    run(verb, folder, tmp_path)
    assert not marker.exists()


def test_trusted_code_runs(foreign_model, tmp_path, marker, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    run("generate", foreign_model, tmp_path, "--trust-remote-code", "--max-new-tokens", "2")
    assert marker.exists()


def test_from_python_too(foreign_model, foreign_tokenizer, tmp_path, marker):
    pytest.importorskip("lm_eval")
    for model in (foreign_model, foreign_tokenizer):
        with pytest.raises(UserError, match="trust_remote_code=True"):
            load_causal_lm(model)
        with pytest.raises(UserError, match="trust_remote_code=True"):
            harness_perplexity(model, tmp_path / "task.yaml", context_length=8)
    with pytest.raises(UserError, match="tokenizer.path .*code.py"):
        loaded_tokenizer(foreign_tokenizer)
    assert not marker.exists()


def test_code_of_another_repository_is_named(foreign_model):
    config = json.loads((foreign_model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "someone/else--sub.code.ForeignConfig"}
    (foreign_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="someone/else: sub/code.py"):
        load_causal_lm(foreign_model)


def test_a_kernel_of_the_hub_is_foreign_code(tokenizer, tmp_path):
    folder = exported(tokenizer, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/attention"}))
    with pytest.raises(UserError, match="someone/attention"):
        load_causal_lm(folder)


def test_a_model_type_of_transformers_needs_no_code(foreign_model, marker):
    config = json.loads((foreign_model / "config.json").read_text())
    (foreign_model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    shutil.rmtree(foreign_model / "__pycache__", ignore_errors=True)
    model, _ = load_causal_lm(foreign_model)
    assert isinstance(model, GPT2LMHeadModel) and not marker.exists()
