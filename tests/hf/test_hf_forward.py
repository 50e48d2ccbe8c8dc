"""The forward pass: causal, alike in every attention implementation, with transformers' whole interface."""

import pytest
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.configuration_kanlm import FFN_TYPES

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def test_no_token_sees_a_later_one(build, arm, ids):
    model = build(arm)
    changed = ids.clone()
    changed[:, 12:] = torch.randint(1, 300, (2, 8))
    before, after = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], **CLOSE)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 0.1


def test_positions_are_relative(build, arm, ids):
    model = build(arm)
    positions = torch.arange(20)[None]
    torch.testing.assert_close(
        logits(model, ids, position_ids=positions), logits(model, ids, position_ids=positions + 30), **CLOSE
    )
    assert (logits(model, ids) - logits(model, ids, position_ids=2 * positions)).abs().max() > 0.01


def test_left_padding_changes_nothing(build, arm, ids):
    model = build(arm)
    padded = torch.cat((torch.zeros(2, 5, dtype=ids.dtype), ids), dim=1)
    mask = (torch.arange(25) >= 5).long().expand(2, -1)
    positions = (torch.arange(25) - 5).clamp(min=0).expand(2, -1)
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask, position_ids=positions)[:, 5:], logits(model, ids), **CLOSE
    )


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_equal_separate_ones(build, arm, ids, attention, use_cache):
    model = build(arm)
    model.set_attn_implementation(attention)
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    packed = logits(model, ids[:1], position_ids=positions, use_cache=use_cache)
    torch.testing.assert_close(packed[:, :7], logits(model, ids[:1, :7]), **CLOSE)
    torch.testing.assert_close(packed[:, 7:], logits(model, ids[:1, 7:]), **CLOSE)
    assert (packed[:, 7:] - logits(model, ids[:1])[:, 7:]).abs().max() > 0.01


@pytest.mark.parametrize("padded", [False, True])
def test_eager_and_sdpa_agree(build, arm, ids, padded):
    model = build(arm)
    arguments = {"attention_mask": (torch.arange(20) >= torch.tensor([[0], [4]])).long()} if padded else {}
    model.set_attn_implementation("eager")
    eager = logits(model, ids, **arguments)
    model.set_attn_implementation("sdpa")
    sdpa = logits(model, ids, **arguments)
    torch.testing.assert_close(eager[0], sdpa[0], **CLOSE)
    torch.testing.assert_close(eager[1, 4:], sdpa[1, 4:], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"attention_mask": (torch.arange(20) >= torch.tensor([[0], [4]])).long()},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {
                "position_ids": torch.cat((torch.arange(7), torch.arange(13))).expand(2, -1),
                "use_cache": False,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["padded", "plain", "packed"],
)
def test_flex_attention_agrees(build, ids, case):
    model = build("kan_glu", head_dim=16)
    expected = logits(model, ids, **case)
    model.set_attn_implementation("flex_attention")
    found = logits(model, ids, **case)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1, 4:], expected[1, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_flash_attention_agrees(build, ids):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    model = build("kan_glu", head_dim=16).to("cuda", torch.bfloat16)
    expected = logits(model, ids.cuda())
    model.set_attn_implementation("flash_attention_2")
    torch.testing.assert_close(logits(model, ids.cuda()), expected, atol=0.05, rtol=0.05)


def test_arguments_reach_the_attention_function(build, arm, ids):
    seen = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("recording", recording)
    model = build(arm)
    expected = logits(model, ids)
    model.set_attn_implementation("recording")
    positions = torch.arange(20)[None]
    result = logits(
        model,
        ids,
        position_ids=positions,
        cu_seq_lens_q=torch.tensor([0, 20]),
        max_length_q=20,
        own_argument=7,
    )
    assert len(seen) == 2
    for kwargs in seen:
        assert kwargs["own_argument"] == 7 and kwargs["max_length_q"] == 20
        assert torch.equal(kwargs["cu_seq_lens_q"], torch.tensor([0, 20]))
        assert torch.equal(kwargs["position_ids"], positions)
        assert kwargs["scaling"] == 8**-0.5 and kwargs["dropout"] == 0.0
    torch.testing.assert_close(result, expected, **CLOSE)


def test_dropout_acts_in_training_only(build, ids):
    model = build("kan_glu", attention_dropout=0.5)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.allclose(logits(model, ids), logits(model, ids))


def test_hidden_states_and_attentions(build, arm, ids):
    model = build(arm)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        base = model.model(ids)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 20, 32)] * 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(out.hidden_states[-1], base.last_hidden_state)
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 20, 20)] * 2
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 20))
        assert weights.triu(1).abs().max() == 0


def test_logits_to_keep(build, arm, ids):
    model = build(arm)
    full = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=3), full[:, -3:], **CLOSE)
    places = torch.tensor([0, 4, 9])
    torch.testing.assert_close(logits(model, ids, logits_to_keep=places), full[:, places], **CLOSE)
    each = torch.tensor([[1, 5], [2, 19]])
    expected = torch.stack((full[0, [1, 5]], full[1, [2, 19]]))
    torch.testing.assert_close(logits(model, ids, logits_to_keep=each), expected, **CLOSE)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) > 0.5
    torch.testing.assert_close(logits(model, ids, logits_to_keep=mask), full[mask], **CLOSE)


def test_tuples_on_request(build, ids):
    model = build("kan_glu")
    with torch.no_grad():
        as_tuple = model(ids, labels=ids, return_dict=False, use_cache=False)
        named = model(ids, labels=ids)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
    assert torch.equal(as_tuple[0], named.loss) and torch.equal(as_tuple[1], named.logits)


def test_embeddings_in_place_of_ids(build, arm, ids):
    model = build(arm)
    torch.testing.assert_close(
        logits(model, inputs_embeds=model.get_input_embeddings()(ids)), logits(model, ids), **CLOSE
    )
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": torch.randn(2, 20, 32)}):
        with pytest.raises(ValueError, match="input_ids, inputs_embeds: give exactly one"):
            model(**wrong)
    with pytest.raises(ValueError, match="input_ids: no token; begin an empty text with bos_token_id"):
        model(ids[:, :0])


def test_loss_is_the_cross_entropy_of_the_next_token(build, arm, ids):
    model = build(arm)
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    rows = nn.functional.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    scored = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(out.loss, rows.sum() / scored)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=100).loss, rows.sum() / 100)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, out.loss)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, out.loss)


def test_loss_of_micro_batches_adds_up(build, arm, ids):
    """With num_items_in_batch, unequal micro-batches give the whole batch's loss and gradient."""
    model = build(arm)
    labels = ids.clone()
    labels[0, :15] = -100
    count = int((labels[:, 1:] != -100).sum())
    whole = model(ids, labels=labels).loss
    whole.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(2)]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(build, arm, ids, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(arm).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_are_those_of_llama(build, rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 500.0, **rope}
    model = build("kan_glu", rope_parameters=dict(rope))
    sizes = dict(hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(rope)))
    positions = torch.tensor([[0, 1, 5, 63, 90]])
    for dtype in (torch.float32, torch.bfloat16):  # angles are fp32 all the same
        x = torch.randn(1, 5, 32, dtype=dtype)
        for found, expected in zip(model.model.rotary_emb(x, positions), theirs(x, positions), strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(build, ids, rope, tmp_path):
    plain = logits(build("kan_glu"), ids)
    model = build("kan_glu", rope_parameters={"rope_theta": 10000.0, **rope})
    scaled = logits(model, ids)
    assert torch.isfinite(scaled).all()
    assert torch.equal(scaled, plain) == (
        rope["rope_type"] == "dynamic"
    )  # which acts beyond 64 positions only
    long = torch.randint(1, 300, (1, 150))
    expected = logits(model, long)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path), long), expected, **CLOSE)


def test_arms_built_after_one_seed_share_what_they_have_in_common():
    """Draws are by name: the arms' attention, embeddings and equally large projections are equal."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    models = {}
    for arm in FFN_TYPES:
        torch.manual_seed(3)
        models[arm] = KanLMForCausalLM(KanLMConfig(**sizes, num_attention_heads=2, ffn_type=arm)).state_dict()
    reference = models["gelu"]
    for arm, weights in models.items():
        common = [name for name in weights if ".mlp." not in name]
        common += [n for n in weights if ".mlp." in n and n.endswith("_proj.weight") and n in reference]
        assert all(torch.equal(weights[name], reference[name]) for name in common), arm
    assert torch.equal(
        models["kan_glu"]["model.layers.1.mlp.gate_proj.weight"],
        models["swiglu"]["model.layers.1.mlp.gate_proj.weight"],
    )
    # Names give different draws, and another seed gives others.
    layers = [reference[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)
    again = KanLMForCausalLM(KanLMConfig(**sizes, num_attention_heads=2, ffn_type="gelu")).state_dict()
    assert not torch.equal(again["model.embed_tokens.weight"], reference["model.embed_tokens.weight"])
