"""Saving and loading: exact, in every dtype, sharded, tied and untied, and never with random weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from kanlm.model import KanLMForCausalLM, KanLMModel
from kanlm.model.configuration_kanlm import FFN_TYPES
from kanlm.model.modeling_kanlm import KanLMPreTrainedModel


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def in_two_parts(model, ids):
    """The logits of ids, the second part read from the cache of the first."""
    with torch.no_grad():
        start = model(ids[:, :11])
        rest = model(ids[:, 11:], past_key_values=start.past_key_values).logits
    return torch.cat((start.logits, rest), dim=1)


def rewritten(folder, change):
    """The single safetensors file of `folder` with `change(weights)` applied."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_save_and_load_is_exact_and_complete(build, arm, ids, tmp_path):
    model = build(arm)
    model.save_pretrained(tmp_path)
    loaded, info = KanLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not loaded.training


VARIANTS = [{"ffn_type": ffn_type} for ffn_type in FFN_TYPES] + [
    {"ffn_type": "kan_glu", "kan_glu_form": "residual"},
    {"ffn_type": "kan_glu", "kan_basis": "rational"},
    {"ffn_type": "kan_glu", "kan_basis": "linear", "kan_order": 1},
    {"ffn_type": "kan_grouped", "kan_basis": "rational", "kan_num_groups": 8},
    {"ffn_type": "kan", "kan_base": "none", "kan_conditioning": "whitened"},
    {"ffn_type": "kan_mixed", "kan_conditioning": "whitened"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_architecture_survives_saving_meta_loading_and_decoding(build, ids, tmp_path, fields):
    model = build(**fields)
    model.save_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path)
    expected = logits(model, ids)
    assert torch.equal(logits(loaded, ids), expected)
    torch.testing.assert_close(
        in_two_parts(loaded, ids), expected, atol=1e-4, rtol=0
    )  # rounding of "whitened": 1e-5
    half = KanLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (logits(half, ids).float() - expected).square().mean().sqrt() < 0.1 * expected.std()
    double = loaded.double()
    torch.testing.assert_close(in_two_parts(double, ids), logits(double, ids), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_saved_and_honoured(build, arm, ids, tmp_path, dtype):
    model = build(arm)
    half = build(arm).to(dtype)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32  # .to() casts every buffer that lets it
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    half.save_pretrained(tmp_path)
    assert KanLMForCausalLM.from_pretrained(tmp_path).dtype == dtype
    wide = KanLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert wide.model.rotary_emb.inv_freq.dtype == torch.float32
    exact = logits(model, ids)
    scale = exact.std()
    assert (logits(wide, ids) - exact).abs().max() < 0.1 * scale  # weights rounded once
    assert (logits(half, ids).float() - exact).abs().max() < 0.2 * scale  # and every activation


@pytest.mark.parametrize(
    "basis", ["bspline", "rbf", "chebyshev", "wavelet", "fourier", "relu_switch", "linear"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids_and_frequencies_are_right_after_loading(build, ids, tmp_path, basis, dtype):
    model = build("kan", kan_basis=basis, kan_conditioning="whitened")
    model.save_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    buffers = dict(loaded.named_buffers())
    for name, expected in model.named_buffers():
        assert buffers[name].dtype == torch.float32, f"{name} lost precision"
        assert torch.equal(buffers[name], expected), name
    x = torch.linspace(-5, 5, 64)[:, None].expand(-1, 32)
    layer, same = model.model.layers[1].mlp.up_proj, loaded.model.layers[1].mlp.up_proj
    assert torch.equal(layer.features(x), same.features(x))


def test_tied_head_is_not_in_the_file_and_shares_storage(build, ids, tmp_path):
    model = build("kan_glu")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = KanLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    before = logits(loaded, ids)
    loaded.resize_token_embeddings(320)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.config.vocab_size == 320
    torch.testing.assert_close(logits(loaded, ids)[..., :300], before)
    loaded.save_pretrained(tmp_path / "resized")
    assert torch.equal(
        logits(KanLMForCausalLM.from_pretrained(tmp_path / "resized"), ids), logits(loaded, ids)
    )


def test_untied_head_is_saved_and_its_own(build, arm, ids, tmp_path):
    model = build(arm, tie_word_embeddings=False)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    loaded = KanLMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_sharded_checkpoints_reload(build, arm, ids, tmp_path):
    model = build(arm)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    assert torch.equal(logits(KanLMForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        KanLMForCausalLM.from_pretrained(tmp_path)


def test_auto_classes_know_the_model(build, ids, tmp_path):
    model = build("kan_glu")
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is KanLMForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is KanLMModel
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))) is KanLMForCausalLM


def test_a_base_model_loads_under_a_tied_head(build, ids, tmp_path):
    model = build("kan_glu")
    model.model.save_pretrained(tmp_path)
    assert torch.equal(logits(KanLMForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


def test_construction_on_the_meta_device_allocates_nothing(build, arm):
    with torch.device("meta"):
        model = build(
            arm, hidden_size=4096, intermediate_size=8192, num_hidden_layers=40, num_attention_heads=32
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**9


def test_initialisation_reaches_every_tensor(build, arm):
    """Filled with one strange value, as memory from the meta device may be, nothing of it is left."""
    model = build(arm)
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(123.0)
    model.initialize_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not (tensor == 123.0).any(), name


def test_initialisation_leaves_loaded_tensors_alone(build, arm):
    model = build(arm)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for module in model.modules():
        module._is_hf_initialized = False
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]), name


def test_initial_scales(build, arm):
    """GPT-2's: normal weights, those into the residual stream smaller by sqrt(2 layers)."""
    torch.manual_seed(0)
    config = build(
        arm, hidden_size=128, intermediate_size=128, num_hidden_layers=8, initializer_range=0.05
    ).config
    model = KanLMForCausalLM(config)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.05)
    for layer in model.model.layers:
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
        if arm != "kan":
            assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
        assert (layer.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("key", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_missing_parameter_is_an_error_that_names_it(build, arm, tmp_path, key):
    build(arm).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.pop(key))
    for load in (KanLMForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=f"checkpoint lacks {key}"):
            load.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="checkpoint lacks"):
        KanLMModel.from_pretrained(tmp_path)
    _, info = KanLMForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )  # the report, when asked for
    assert info["missing_keys"] == {key}


def test_a_missing_untied_head_is_an_error(build, tmp_path):
    build("kan_glu", tie_word_embeddings=False).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="checkpoint lacks lm_head.weight"):
        KanLMForCausalLM.from_pretrained(tmp_path)


def test_an_unexpected_parameter_is_an_error_that_names_it(build, arm, tmp_path):
    build(arm).save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.update({"model.layers.0.mlp.extra": torch.ones(3)}))
    with pytest.raises(ValueError, match="model has not, model.layers.0.mlp.extra"):
        KanLMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_ignored_by_the_base_model_alone(build, ids, tmp_path, tied):
    model = build("kan_glu", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        hidden = KanLMModel.from_pretrained(tmp_path)(ids).last_hidden_state
        assert torch.equal(hidden, model.model(ids).last_hidden_state)
    rewritten(tmp_path, lambda weights: weights.update({"lm_head.bias": torch.ones(300)}))
    with pytest.raises(ValueError, match="model has not, lm_head.bias"):
        KanLMForCausalLM.from_pretrained(tmp_path)
    # vLLM drops keys that match these, which would lose an untied head.
    assert not KanLMModel._keys_to_ignore_on_load_unexpected


def test_weights_of_another_arm_are_an_error(build, tmp_path):
    build("swiglu").save_pretrained(tmp_path / "swiglu")
    build("kan_glu").save_pretrained(tmp_path / "kan_glu")
    shutil.copy(tmp_path / "swiglu" / "model.safetensors", tmp_path / "kan_glu" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks model.layers.0.mlp.phi.coefficients"):
        KanLMForCausalLM.from_pretrained(tmp_path / "kan_glu")


def test_another_grid_size_is_an_error_unless_ignored(build, ids, tmp_path):
    build("kan_glu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kan_grid_size": 7}))
    with pytest.raises(ValueError, match="in another shape model.layers.0.mlp.phi.coefficients"):
        KanLMForCausalLM.from_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    fresh = loaded.model.layers[0].mlp.phi
    assert torch.isfinite(fresh.coefficients).all() and torch.isfinite(logits(loaded, ids)).all()


def test_a_new_task_head_on_the_base_model_may_be_random(build, ids, tmp_path):
    class Classifier(KanLMPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = KanLMModel(config)
            self.score = torch.nn.Linear(config.hidden_size, 3)
            self.post_init()

    model = build("kan_glu")
    model.save_pretrained(tmp_path)
    loaded, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    rewritten(tmp_path, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="lacks model.norm.weight"):
        Classifier.from_pretrained(tmp_path)
