"""Models of other families start unchanged as KANs, and load where kanlm cannot be imported."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from kanlm.config import UserError
from kanlm.convert import convert, converted_model, perplexity, text_batch
from kanlm.data.tokenizer import trained_tokenizer
from kanlm.evaluation.loading import load_causal_lm
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.modeling_converted import CONVERTED

torch.set_num_threads(1)
TEXT = "".join(f"{age} cats see {count} birds, été ☃.\n" for age in ("old", "new") for count in range(200))
LLAMA_SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
IDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
GPT2_SIZES = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
GATED = [family for family in CONVERTED if family != "gpt2"]
CASES = [*((family, "kan_glu") for family in GATED), ("gpt2", "kan_act"), ("gpt2", "kan_grouped")]

CLEAN = """
import sys
sys.modules["kanlm"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = torch.load(folder + "/expected.pt")
        assert torch.equal(model(ids).logits, expected), folder
        print(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1])
"""


def original(family: str):
    torch.manual_seed(0)
    config, model = CONVERTED[family].config_class.__mro__[1], CONVERTED[family].__mro__[2]
    model = model(config(**(GPT2_SIZES if family == "gpt2" else LLAMA_SIZES), **IDS)).eval()
    with torch.no_grad():  # biases too, which start at zero
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(iter(TEXT.splitlines(keepends=True)), 300)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """saved(family): the folder of the original model."""
    root = tmp_path_factory.mktemp("original")

    def saved(family: str):
        if not (root / family).exists():
            original(family).save_pretrained(root / family)
            tokenizer.save_pretrained(root / family)
        return root / family

    return saved


@pytest.mark.parametrize("family, arm", CASES)
def test_start_is_exactly_the_original(family, arm):
    source = original(family)
    converted = converted_model(source, arm, groups=4)
    ids = torch.randint(300, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, source(ids).logits, rtol=1e-6, atol=1e-6)
        for name, parameter in converted.named_parameters():
            if name.endswith("coefficients"):
                parameter += 0.1
        assert (converted(ids).logits - source(ids).logits).abs().max() > 1e-3


SAMPLE = [("llama", "kan_glu"), ("gpt2", "kan_grouped")]


@pytest.mark.parametrize("cases", [SAMPLE, pytest.param(CASES, marks=[pytest.mark.slow, pytest.mark.long])])
def test_converted_models_load_and_generate_where_kanlm_cannot_be_imported(saved, tmp_path, cases):
    folders = []
    for family, arm in cases:
        out = tmp_path / f"{family}-{arm}"
        convert(saved(family), arm, out, groups=4)
        model, _ = load_causal_lm(out)  # by the installed package, without trust
        with torch.no_grad():
            torch.save(model(torch.arange(1, 9)[None]).logits, out / "expected.pt")
        folders.append(str(out))
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, *folders], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12"] * len(cases)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family, arm", CASES)
def test_converted_models_run_in_onnx(saved, tmp_path, family, arm):
    import numpy as np

    from kanlm.edge.runtime import OnnxModel
    from kanlm.export import export_onnx

    convert(saved(family), arm, tmp_path / "out", groups=4)
    session = OnnxModel(export_onnx(tmp_path / "out") / "model.onnx", threads=1)
    ids = torch.randint(300, (2, 9))
    first, cache = session.step(ids[:, :5].numpy(), session.empty_cache(2))
    second, _ = session.step(ids[:, 5:].numpy(), cache)
    with torch.no_grad():
        expected = load_causal_lm(tmp_path / "out")[0](ids).logits
    np.testing.assert_allclose(np.concatenate((first, second), axis=1), expected, atol=1e-4)


def test_swiglu_of_kanlm_becomes_kan_glu(tmp_path):
    torch.manual_seed(0)
    source = KanLMForCausalLM(KanLMConfig(ffn_type="swiglu", **LLAMA_SIZES)).eval()
    converted = converted_model(source, "kan_glu")
    ids = torch.randint(300, (2, 20))
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, source(ids).logits)
    assert converted.config.ffn_type == "kan_glu"


@torch.no_grad()
def divergence_from(source, model, ids) -> float:
    """Kullback-Leibler divergence of the next token, source from `model`, in nats."""
    theirs, ours = (one(ids).logits.log_softmax(-1).flatten(0, 1) for one in (source, model))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gpt2", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_edge_functions_learn_the_blocks(saved, tmp_path, family):
    (tmp_path / "text.txt").write_text(TEXT)
    said = convert(
        saved(family), "kan", tmp_path / "out", data=str(tmp_path / "text.txt"), tokens=2048, steps=60
    )
    before, after = (float(part.split()[0]) for part in said.split("perplexity")[1].split("->"))
    untrained = converted_model(original(family), "kan")
    model, tokenizer = load_causal_lm(tmp_path / "out")
    batch = text_batch(model, tokenizer, str(tmp_path / "text.txt"), None, 2048)[1::2]
    assert perplexity(model, batch) == pytest.approx(after, rel=1e-3)
    # A source of random weights is hardly worse without its blocks, so its perplexity tells little; what it
    # answers, on text that was not distilled, tells whether they were learned.
    source = original(family)
    assert divergence_from(source, model, batch) < 0.5 * divergence_from(source, untrained, batch)


def test_mistakes_are_one_line(saved, tokenizer, tmp_path):
    with pytest.raises(UserError, match="kan_act.*does not fit.*gated.*kan_glu"):
        convert(saved("llama"), "kan_act", tmp_path / "out", groups=4)
    with pytest.raises(UserError, match="groups: 5 does not divide"):
        convert(saved("llama"), "kan_glu", tmp_path / "out", groups=5)
    with pytest.raises(UserError, match="--arm: unknown arm 'mlp'"):
        convert(saved("llama"), "mlp", tmp_path / "out")
    with pytest.raises(UserError, match="--data"):
        convert(saved("llama"), "kan", tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        convert(saved("llama"), "kan_glu", saved("llama"))
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"gpt_neox\) cannot be converted; supported are llama"):
        convert(tmp_path / "other", "kan_glu", tmp_path / "out")
    assert not (tmp_path / "out").exists()
