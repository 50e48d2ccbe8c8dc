"""The page and JSON of an inspection: planted functions are found, every arm is shown."""

import itertools
import json
import random
import re

import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kanlm.cli import cli
from kanlm.config import UserError
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.export import export_model
from kanlm.interpret.functions import token_batch
from kanlm.interpret.inspect import inspection, terminal_table
from kanlm.interpret.page import page
from kanlm.interpret.statistics import STATISTICS
from kanlm.model import KanLMConfig, KanLMForCausalLM

OUTPUT, INPUT = 6, 5


def plant_sine(network):
    """All functions of edges are zero, but for a sine in the last layer."""
    with torch.no_grad():
        for block in network.model.layers:
            for layer in (block.mlp.up_proj, block.mlp.down_proj):
                layer.spline.weight.zero_()
                layer.base.weight.zero_()
            torch.nn.init.normal_(block.mlp.up_proj.base.weight, std=0.3)
        layer = network.model.layers[-1].mlp.down_proj
        points = torch.linspace(layer.basis.grid_min, layer.basis.grid_max, 200)
        basis = layer.basis.values(points.unsqueeze(-1)).squeeze(-1)
        fit = torch.linalg.lstsq(basis, torch.sin(2 * points + 0.4).unsqueeze(1)).solution.squeeze(1)
        layer.spline.weight.view(layer.out_features, -1, layer.in_features)[OUTPUT, :, INPUT] = fit


def test_a_planted_sine_is_ranked_first_and_named(model, letters, text):
    network = model("kan", kan_grid_size=16)
    plant_sine(network)
    found = inspection(network, letters, token_batch(network, letters, text, 1400, rows=16))
    layer = next(row for row in found["layers"] if row["module"] == "layer 1 down_proj")
    first = layer["curves"][0]
    assert first["label"] == f"layer 1 down_proj [{OUTPUT}, {INPUT}]" and first["share"] > 0.999
    assert first["formula"].split("(")[0].endswith("sin") and first["formula_r2"] > 0.999
    assert layer["scatter"][0][1] == max(effect for _, effect in layer["scatter"]) > 0
    assert all(effect < 1e-6 for _, effect in layer["scatter"][1:])
    assert layer["statistics"]["share_for_90_percent"]["trained"] == pytest.approx(1 / layer["functions"])
    assert layer["statistics"]["share_for_90_percent"]["random"]["p"] == found["smallest_p"]
    lost = {row["module"]: row for row in found["removal"]["layers"]}["layer 1 down_proj"]
    assert abs(lost["formula"]["change"]) < 1e-3 < abs(lost["line"]["change"])


@pytest.mark.parametrize(
    "ffn_type", ["kan", "kan_mixed", "kan_grouped", "kan_glu", "gelu", "swiglu", "relu2", "geglu", "xielu"]
)
def test_every_arm_has_a_page(ffn_type, model, letters, text):
    network = model(ffn_type)
    batch = token_batch(network, letters, text, 1000, rows=16)
    found = inspection(network, letters, batch, functions=3)
    found |= {"model": "m", "data": "letters", "kanlm_version": "0"}
    json.dumps(found, allow_nan=False)
    html = page(found)
    for row in found["layers"]:
        assert row["module"] in html and len(row["curves"]) == 3
        for key, cell in row["statistics"].items():
            assert key in STATISTICS and (cell["trained"] is None or cell["random"]["value"] is not None)
        for driven in row["drivers"]:
            assert len({place["token"] for place in driven["high"]}) == 4
            assert driven["high"][0]["value"] == max(place["value"] for place in driven["high"])
    assert ("start" in found["removal"]["all"]) == ffn_type.startswith("kan")
    assert not re.search(r"(src|href)=\"(?!#)|url\(|@import|<script", html)
    assert "all layers" in terminal_table(found)


def test_learned_parts_that_matter_are_told_from_parts_that_do_not(model, letters, text):
    network = model("kan_glu")
    batch = token_batch(network, letters, text, 1400, rows=16)
    learned = inspection(network, letters, batch)["removal"]["all"]["start"]
    with torch.no_grad():
        for block in network.model.layers:
            block.mlp.phi.reset_parameters()
    untouched = inspection(network, letters, batch)["removal"]["all"]["start"]
    assert abs(learned["change"]) > 1e-4 and abs(untouched["change"]) < 1e-6


def run(*arguments):
    result = CliRunner().invoke(cli, ["inspect", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_mistakes_are_one_line(tmp_path, model):
    assert "4096" in run("/nowhere", "--tokens", "3")
    assert "no such folder" in run("/nowhere")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model with a tokenizer of its own, and a text."""
    root = tmp_path_factory.mktemp("model")
    words = random.Random(1)
    text = " ".join(words.choice(["red", "green", "blue", "one", "two", "three"]) for _ in range(1200))
    (root / "text.txt").write_text(text, encoding="utf-8")
    (root / "empty.txt").write_text("", encoding="utf-8")
    (root / "blank.txt").write_text("\n \n", encoding="utf-8")
    tokenizer = trained_tokenizer([text], 300)
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        kan_num_groups=2,
    )
    export_model(KanLMForCausalLM(config), tokenizer, root / "hf", {"name": "words"})
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")
    return root


@pytest.mark.parametrize("name", ["hf", "llama"])
def test_inspect_and_prune_from_the_command_line(name, folder, tmp_path):
    data = ["--data", str(folder / "text.txt"), "--tokens", "512"]
    result = CliRunner().invoke(cli, ["inspect", str(folder / name), *data, "--out", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "page" / "inspect.json").read_text(encoding="utf-8"))
    assert found["tokens"]["statistics"] + found["tokens"]["loss"] <= 512 and found["layers"]
    assert "</html>" in (tmp_path / "page" / "inspect.html").read_text(encoding="utf-8")
    out = tmp_path / "small"
    if name == "hf":
        result = CliRunner().invoke(
            cli, ["prune", str(folder / name), *data, "--keep", "0.5", "--out", str(out)]
        )
        assert result.exit_code == 0, result.output
        small = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert small.config.intermediate_size == 8
        assert f"{sum(p.numel() for p in small.parameters()):,}" in result.output


def test_data_without_tokens_and_models_without_functions_are_one_line(folder, tmp_path, model):
    for verb, text in itertools.product(("inspect", "prune"), ("empty.txt", "blank.txt")):
        arguments = [verb, str(folder / "hf"), "--data", str(folder / text), "--out", str(tmp_path / "x")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code != 0 and not (tmp_path / "x").exists()
        assert isinstance(result.exception, UserError) and text in str(result.exception)
    config = GPTNeoXConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    AutoTokenizer.from_pretrained(folder / "hf").save_pretrained(tmp_path / "neox")
    assert "looked for KANLinear, LearnedFunction" in run(str(tmp_path / "neox"))
