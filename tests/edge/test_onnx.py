"""ONNX files give torch's logits, cached and padded; the files that runtimes read beside them."""

import json

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from kanlm import kernels
from kanlm.config import UserError
from kanlm.edge import onnx_export
from kanlm.edge.int8 import quantised
from kanlm.edge.runtime import OnnxModel, generate, onnx_file, sampler
from kanlm.model.configuration_kanlm import FFN_TYPES

SAMPLE = "kan"
ALL = [
    SAMPLE,
    *(pytest.param(arm, marks=[pytest.mark.slow, pytest.mark.long]) for arm in FFN_TYPES if arm != SAMPLE),
]


def random_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 300, (batch, length))


@pytest.mark.parametrize("arm", ALL)
@pytest.mark.parametrize("batch", [1, 4])
def test_logits_over_200_cached_steps_are_those_of_torch(onnx_of, arm, batch):
    model, folder = onnx_of(arm)
    ids = random_ids(batch, 207)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    session = OnnxModel(folder / "model.onnx", threads=1)
    logits, cache = session.step(ids[:, :7], session.empty_cache(batch))
    steps = [logits]
    for at in range(7, 207):
        logits, cache = session.step(ids[:, at : at + 1], cache)
        steps.append(logits)
    assert np.abs(np.concatenate(steps, axis=1) - expected).max() < 1e-4
    assert np.abs(expected).max() > 0.5


def test_padding_on_the_left_changes_nothing(onnx_of):
    _, folder = onnx_of(SAMPLE)
    session = OnnxModel(folder / "model.onnx", threads=1)
    ids = random_ids(1, 6)
    alone, cache = session.step(ids, session.empty_cache())
    padded = np.concatenate((np.zeros((1, 3), np.int64), ids), axis=1)
    mask = (np.arange(9) >= 3).astype(np.int64)[None]
    logits, padded_cache = session.step(padded, session.empty_cache(), mask)
    np.testing.assert_allclose(logits[:, 3:], alone, atol=1e-5)
    after, _ = session.step(np.array([[5]]), cache)
    padded_after, _ = session.step(np.array([[5]]), padded_cache, np.append(mask, [[1]], axis=1))
    np.testing.assert_allclose(padded_after, after, atol=1e-5)


def test_int8_file_is_smaller_and_near(onnx_of):
    model, folder = onnx_of(SAMPLE)
    ids = random_ids(2, 20)
    session = OnnxModel(folder / "model_int8.onnx", threads=1)
    logits, _ = session.step(ids, session.empty_cache(2))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    error = np.abs(logits - expected)
    assert 0 < error.max() < 0.2 * expected.std()
    assert (folder / "model_int8.onnx").stat().st_size < 0.7 * (folder / "model.onnx").stat().st_size


@pytest.mark.slow
def test_functions_of_a_table_graph_are_five_operations(onnx_of, build_tiny, tokenizer, tmp_path):
    import onnx

    model, _ = onnx_of(SAMPLE)
    with pytest.raises(UserError, match="--tables: KanLMForCausalLM has no learned functions"):
        onnx_export.write_onnx(model, tokenizer, tmp_path / "kan", tables=True)
    grouped = build_tiny("kan_grouped")
    folder = onnx_export.write_onnx(grouped, tokenizer, tmp_path / "onnx", int8=True, tables=True)
    ids = random_ids(2, 20)
    with torch.no_grad():
        expected = grouped(torch.from_numpy(ids)).logits.numpy()
    nodes = {}
    for name, allowed in (("model.onnx", 1e-4), ("model_tables.onnx", 0.1), ("model_int8.onnx", 0.2)):
        session = OnnxModel(folder / name, threads=1)
        logits, _ = session.step(ids, session.empty_cache(2))
        assert np.abs(logits - expected).max() < allowed * expected.std()
        nodes[name] = [node.op_type for node in onnx.load(folder / name).graph.node]
    functions = sum(type(module).__name__ == "LearnedFunction" for module in grouped.modules())
    for name in ("model_tables.onnx", "model_int8.onnx"):
        assert nodes[name].count("Softsign") == functions and "Floor" not in nodes[name]
    assert "Softsign" not in nodes["model.onnx"]


def test_int8_numbers_are_within_half_a_scale():
    weight = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32)
    weight[2, :32] = 0
    numbers, scales = quantised(weight)
    unpacked = ((numbers.astype(np.float32) - 128) * scales[..., None]).reshape(5, -1)[:, :70]
    assert (np.abs(unpacked - weight) <= np.repeat(scales, 32, axis=1)[:, :70] / 2 + 1e-7).all()
    assert (unpacked[2, :32] == 0).all()


def test_files_of_other_runtimes_name_what_the_graph_has(onnx_of):
    import onnx

    _, folder = onnx_of(SAMPLE)
    graph = onnx.load(folder / "model.onnx").graph
    genai = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder = genai["decoder"]
    layers = range(decoder["num_hidden_layers"])
    kinds = ("past_key_names", "past_value_names")
    past = [decoder["inputs"][kind] % layer for layer in layers for kind in kinds]
    assert {value.name for value in graph.input} == {"input_ids", "attention_mask", *past}
    present = [
        decoder["outputs"][kind.replace("past", "present")] % layer for layer in layers for kind in kinds
    ]
    assert [value.name for value in graph.output] == ["logits", *present]
    dims = [dim.dim_value for dim in graph.input[2].type.tensor_type.shape.dim]
    assert dims == [0, decoder["num_key_value_heads"], 0, decoder["head_size"]]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["head_dim"] == decoder["head_size"]
    assert genai["eos_token_id"] == config["eos_token_id"] == 0


def test_greedy_text_is_that_of_torch(onnx_of, tokenizer):
    model, folder = onnx_of(SAMPLE)
    said = []
    text, speed = generate(folder / "model.onnx", "old cats", 12, 0.0, 0, 0, say=said.append)
    inputs = tokenizer("old cats", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        output = model.generate(inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert text == tokenizer.decode(output[0], skip_special_tokens=True)
    assert "".join(said) == text + "\n"
    assert speed.tokens == 12 and speed.tokens_per_second > 0


def test_generate_verb_takes_the_folder(onnx_of, capsys):
    from kanlm.evaluation.generation import generate as by_verb

    _, folder = onnx_of(SAMPLE)
    (text,) = by_verb(str(folder), "old cats", max_new_tokens=5, temperature=0.0)
    said = capsys.readouterr()
    assert said.out == text + "\n" and "5 tokens" in said.err and "tokens/s" in said.err
    with pytest.raises(UserError, match="model_int8.onnx"):
        by_verb(str(folder), "old cats", weights="int8")


def test_folder_or_file_names_the_graph(onnx_of, tmp_path):
    _, folder = onnx_of(SAMPLE)
    assert onnx_file(folder) == folder / "model.onnx"
    assert onnx_file(folder / "model_int8.onnx") == folder / "model_int8.onnx"
    assert onnx_file(tmp_path) is None and onnx_file("owner/model") is None


def test_sampler_draws_only_from_the_top():
    draw = sampler(1.0, 2, 0)
    assert {draw(np.array([0.0, 3.0, 2.9, -1.0])) for _ in range(50)} == {1, 2}
    assert sampler(0.0, 0, 0)(np.array([0.0, 3.0, 2.9])) == 1
    draw = sampler(1.0, 0, 0, top_p=0.5)
    assert {draw(np.log(np.array([0.1, 0.4, 0.3, 0.2]))) for _ in range(50)} == {1, 2}


def test_mistakes_are_one_line(onnx_of, tokenizer, tmp_path, monkeypatch):
    model, folder = onnx_of(SAMPLE)
    with pytest.raises(UserError, match="ask for at most 254"):
        generate(folder / "model.onnx", "old cats", 300, 0.0, 0, 0)
    with pytest.raises(UserError, match="exists already; delete it"):
        onnx_export.write_onnx(model, tokenizer, folder, int8=False)
    with pytest.raises(UserError, match="no such file"):
        OnnxModel(tmp_path / "model.onnx")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    with pytest.raises(UserError, match="not a readable ONNX model"):
        OnnxModel(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="not a decoder"):
        onnx_export.graph(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="MambaForCausalLM: not a decoder.*stays empty"):
        onnx_export.graph(MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)))
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript: not installed.*kanlm\[onnx\]"):
        onnx_export.graph(model)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("arm", ["kan_act", "kan_glu", "gelu", "kan"])
def test_hidden_norm_and_selected_kernels_leave_the_graph_right(build_tiny, tokenizer, tmp_path, arm):
    """What a kernel computed is in the graph as the formula; the model keeps its kernels."""
    model = build_tiny(arm, hidden_norm=True)
    ids = random_ids(2, 12)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    chosen = kernels.select(model, "cpu")
    session = OnnxModel(
        onnx_export.write_onnx(model, tokenizer, tmp_path / "onnx", int8=False) / "model.onnx", 1
    )
    first, cache = session.step(ids[:, :7], session.empty_cache(2))
    second, _ = session.step(ids[:, 7:], cache)
    assert np.abs(np.concatenate((first, second), axis=1) - expected).max() < 1e-4
    assert {name for name, module in model.named_modules() if getattr(module, "kernel", None)} >= {
        name for name, kind in chosen.items() if kind == "cpu"
    }
