"""One native call a token: the reference's tokens and logits for every arm, and refusals in one line."""

import logging
from itertools import pairwise

import pytest
import torch

from kanlm.kernels import decode, native
from kanlm.kernels.decode import NativeDecoder, NotServed, native_decoder
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.configuration_kanlm import FFN_TYPES
from kanlm.model.kan import KANLinear, LearnedFunction

SIZES = {
    **{"vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"kan_num_groups": 4, "kan_grid_size": 5, "initializer_range": 0.2},
}
NEW = 200
FORMS = [{"ffn_type": name} for name in FFN_TYPES]
EDGES = ("kan", "kan_mixed")  # which have the norm anyway
FORMS += [{"ffn_type": name, "hidden_norm": True} for name in FFN_TYPES if name not in EDGES]
FORMS += [{"ffn_type": name, "kan_basis": "linear"} for name in ("kan_glu", "kan", "kan_mixed")]
FORMS += [
    {"ffn_type": "kan_grouped", "kan_basis": "rational"},
    {"ffn_type": "kan", "intermediate_size": 1100},  # more columns than SPAN
    {"ffn_type": "kan_glu", "kan_basis": "rational"},
    {"ffn_type": "kan_glu", "kan_glu_form": "residual", "kan_num_groups": 40},
    {"ffn_type": "kan_grouped", "kan_order": 5, "tie_word_embeddings": False},
    {"ffn_type": "kan", "kan_base": "none", "kan_order": 0},
    {"ffn_type": "kan", "kan_conditioning": "whitened"},
]
FORMS += [  # groups so wide that a short table stays in registers, and a longer one beside them
    {"ffn_type": name, "kan_num_groups": groups, "kan_grid_size": cells, "kan_order": order}
    for name, groups, cells, order in (
        ("kan_act", 1, 8, 3),
        ("kan_glu", 2, 9, 1),
        ("kan_grouped", 1, 3, 2),
        ("kan_product", 2, 16, 3),
        ("kan_product", 2, 17, 3),
    )
]
TABULATED = [
    {"ffn_type": name, "kan_basis": basis}
    for name in ("kan_glu", "kan")
    for basis in ("rbf", "relu_switch", "chebyshev", "fourier", "wavelet")
]


@pytest.fixture(autouse=True)
def compiled():
    try:
        decode.library()
    except native.NativeUnavailable as error:
        pytest.skip(str(error))


def model(**fields):
    """A model with functions away from their start; its inputs fall on and beside the grid."""
    torch.manual_seed(0)
    made = KanLMForCausalLM(KanLMConfig(**SIZES | fields)).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("fields", FORMS + TABULATED, ids=lambda fields: "-".join(map(str, fields.values())))
def test_the_same_greedy_tokens_and_logits_as_the_reference(fields):
    made = model(**fields)
    prompt = [3, 1, 4, 1, 5]
    decoder = NativeDecoder(made, threads=1)
    logits = [decoder.prefill(prompt)]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < NEW:
        logits.append(decoder.step(tokens[-1]))
        tokens.append(int(logits[-1].argmax()))
    with torch.no_grad():  # every prefix at once: greedy decoding takes these tokens or differs at the first
        expected = made(input_ids=torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    assert (torch.stack(logits) - expected).abs().max() < 1e-4
    assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("cells", "groups", "kind"), [(16, 2, "short_table"), (17, 2, "table"), (16, 4, "table")]
)
def test_a_short_table_of_a_wide_group_stays_in_registers(cells, groups, kind):
    decoder = NativeDecoder(model(ffn_type="kan_act", kan_grid_size=cells, kan_num_groups=groups))
    found = {decode.KINDS[operation.kind] for operation in decoder._program.operations}
    assert found & {"table", "short_table"} == {kind}


@pytest.mark.parametrize(
    "fields",
    [{"ffn_type": "kan"}, {"ffn_type": "gelu"}, {"ffn_type": "kan_product", "kan_num_groups": 2}],
    ids=lambda fields: fields["ffn_type"],
)
def test_logits_do_not_depend_on_the_number_of_threads(fields):
    made = model(**fields)
    one, three = NativeDecoder(made, threads=1), NativeDecoder(made, threads=3)
    one.prefill([1, 2]), three.prefill([1, 2])
    for token in (5, 6, 7):
        assert torch.equal(one.step(token), three.step(token))


def test_a_second_prefill_forgets_the_first_text():
    decoder = NativeDecoder(model(ffn_type="kan_glu"), max_length=16)
    decoder.prefill([9] * 12)
    first = decoder.prefill([1, 2, 3]), decoder.step(4)
    decoder.prefill([7] * 16)
    for before, after in zip(first, (decoder.prefill([1, 2, 3]), decoder.step(4)), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["swiglu", "kan_glu", "kan"])
def test_int8_weights_are_a_quarter_and_near(name):
    made = model(ffn_type=name)
    full, small = NativeDecoder(made), NativeDecoder(made, weights="int8")
    assert small.weight_bytes == full.weight_bytes / 4
    assert 0 == full.weight_error < small.weight_error < 0.02
    full.prefill([1, 2]), small.prefill([1, 2])
    expected, rounded = full.step(3), small.step(3)
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize(
    "fields", [{"ffn_type": "swiglu"}, {"ffn_type": "kan"}, {"ffn_type": "kan", "kan_base": "none"}]
)
@torch.no_grad()
def test_int8_logits_are_those_of_a_model_with_the_rounded_weights(fields):
    made = model(tie_word_embeddings=False, **fields)
    decoder = NativeDecoder(made, weights="int8")
    logits = torch.stack([decoder.step(token) for token in (1, 2, 3, 4, 5)])
    inside = {child for layer in made.modules() if isinstance(layer, KANLinear) for child in layer.children()}
    for layer in made.modules():
        parts = []
        if isinstance(layer, KANLinear):  # one scale for an output's edges and base
            parts = [child.weight for child in layer.children()]
        elif isinstance(layer, torch.nn.Linear) and layer not in inside:
            parts = [layer.weight]
        if parts:
            scales = torch.cat(parts, 1).abs().amax(1, keepdim=True) / 127
            for weight in parts:
                weight.copy_((weight / scales).round() * scales)
    expected = made(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0]
    assert (logits - expected).abs().max() < 1e-4


def test_a_full_cache_and_a_token_outside_the_vocabulary_are_errors():
    decoder = NativeDecoder(model(ffn_type="gelu"), max_length=4)
    decoder.prefill([1, 2, 3])
    with pytest.raises(ValueError, match=r"token: must lie in 0\.\.66, got 67"):
        decoder.step(67)
    decoder.step(1)
    with pytest.raises(ValueError, match="5 tokens do not fit the cache of 4 positions"):
        decoder.step(1)


def rope_scaled():
    return model(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})


def with_hook():
    made = model()
    made.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    return made


def with_flex_attention():
    made = model()
    made.config._attn_implementation = "flex_attention"
    return made


class Odd(torch.nn.Module):
    def forward(self, u):
        return torch.fft.rfft(u).real


def with_unknown_operation():
    made = model()
    made.model.layers[1].mlp = Odd()
    return made


def with_adapter_of_embeddings():
    made = model()
    made.model.embed_tokens = OddEmbedding(67, 24)
    return made


class OddEmbedding(torch.nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class OddFunction(LearnedFunction):
    def forward(self, a, u=None):
        return 2 * super().forward(a, u)


def with_own_function():
    made = model(ffn_type="kan_act")
    for layer in made.model.layers:
        layer.mlp.phi.__class__ = OddFunction
    return made


def with_layer_norm():
    made = model()
    made.model.norm = torch.nn.LayerNorm(24)
    return made


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: model(sliding_window=4), "a part of the text only"),
        (lambda: model(layer_types=["full_attention", "sliding_attention"]), "a part of the text only"),
        (with_adapter_of_embeddings, "OddEmbedding in place of Embedding"),
        (with_layer_norm, "LayerNorm in place of RMSNorm"),
        (with_own_function, "ActivationKAN cannot be traced"),
        (rope_scaled, "rotary embeddings are scaled"),
        (with_hook, "model.layers.0.mlp has a hook"),
        (with_flex_attention, "'flex_attention', not sdpa or eager"),
        (with_unknown_operation, "Odd calls"),
        (lambda: model().to(torch.bfloat16), "not in float32"),
        (lambda: torch.nn.Linear(2, 2), "a Linear, not kanlm's own"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_in_one_line(build, reason, caplog, monkeypatch):
    monkeypatch.setattr(decode, "_logged", set())
    with caplog.at_level(logging.WARNING):
        assert native_decoder(build()) is None and native_decoder(build()) is None
    assert len(caplog.messages) == 1 and reason in caplog.text


class Squared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(24, 40, bias=False), torch.nn.Linear(40, 24, bias=False)

    def forward(self, u):
        a = torch.nn.functional.silu(self.up(u))
        return self.down(a * a)


@torch.no_grad()
def test_the_square_of_an_activation_is_one():
    made = model()
    for layer in made.model.layers:
        layer.mlp = Squared()
    decoder = NativeDecoder(made)
    decoder.prefill([1, 2])
    expected = made(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    assert (decoder.step(3) - expected).abs().max() < 1e-4


def test_functions_too_rough_for_a_table_are_refused(monkeypatch):
    monkeypatch.setattr(decode, "TABLE_ERROR", 0.0)
    with pytest.raises(NotServed, match="too rough to tabulate"):
        NativeDecoder(model(ffn_type="kan_glu", kan_basis="wavelet"))


def test_operations_wait_for_what_they_read():
    """A barrier lies between every write to a vector and its next use."""
    program = NativeDecoder(model(ffn_type="kan_product", hidden_norm=True))._program
    written = set()
    for before, operation in pairwise(program.operations):
        written.add(before.y)
        if operation.barrier:
            written.clear()
        assert not written & {operation.a, operation.u}
