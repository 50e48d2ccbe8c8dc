"""Tools around transformers: torch.export, ONNX, quantisation, device maps, what serving engines look for."""

import inspect
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kanlm.model import KanLMConfig, KanLMForCausalLM, KanLMModel, modeling_kanlm
from kanlm.model.kan import KANLinear


class Logits(nn.Module):
    """ids [B, T] to logits [B, T, V]: one tensor in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def program(build):
    """program(arm): the model and its torch.export program with free batch and time, made once."""
    made = {}

    def program(arm):
        if arm not in made:
            model = build(arm)
            sizes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("time", min=2, max=64)}
            with torch.no_grad():
                example = (torch.randint(1, 300, (2, 20)),)
                made[arm] = (
                    model,
                    torch.export.export(Logits(model), example, dynamic_shapes={"input_ids": sizes}),
                )
        return made[arm]

    return program


def test_torch_export_with_free_batch_and_time(program, arm):
    model, exported = program(arm)
    for shape in ((3, 33), (1, 2), (8, 64)):
        ids = torch.randint(1, 300, shape)
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arm", ["kan_glu", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("swiglu", "kan"))]
)
def test_onnx_gives_the_same_logits(program, arm, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, exported = program(arm)
    torch.onnx.export(exported, (torch.randint(1, 300, (2, 20)),), dynamo=True, verbose=False).save(
        tmp_path / "model.onnx"
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((3, 33), (1, 7)):
        ids = torch.randint(1, 300, shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(found) - model(ids).logits).abs().max() <= 1e-4


def test_int8_weights_by_torchao(build, arm, ids, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = build(arm)
    model.save_pretrained(tmp_path)
    quantised = KanLMForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    weights = [
        module.weight
        for name, module in quantised.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    ]
    assert len(weights) >= 14 and all(type(weight) is not nn.Parameter for weight in weights)
    with torch.no_grad():
        exact, rounded = model(ids).logits, quantised(ids).logits
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert 0 < error < 0.1
    layer = quantised.model.layers[0]
    assert layer.input_layernorm.weight.dtype == torch.float32
    quantised.save_pretrained(tmp_path / "int8")
    again = KanLMForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, rounded)


@pytest.mark.gpu
def test_int8_weights_by_bitsandbytes(build, arm, ids, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    model = build(arm)
    model.save_pretrained(tmp_path)
    quantised = KanLMForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cuda"
    )
    with torch.no_grad():
        exact, rounded = model(ids).logits, quantised(ids.cuda()).logits.float().cpu()
    assert 0 < (rounded - exact).square().mean().sqrt() / exact.std() < 0.1


def test_device_map_auto(build, arm, ids, tmp_path):
    model = build(arm)
    model.save_pretrained(tmp_path)
    loaded = KanLMForCausalLM.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        logits = loaded(ids.to(loaded.device)).logits.cpu()
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert not [name for name, tensor in loaded.state_dict().items() if tensor.is_meta]


def test_layers_offloaded_to_disk(build, arm, ids, tmp_path):
    """Parameters come from disk for each call; what is not saved (frequencies) has to survive on its own."""
    model = build(arm, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = KanLMForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert loaded.model.layers[1].self_attn.q_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_layer_is_never_split_between_devices():
    assert KanLMForCausalLM._no_split_modules == ["KanLMDecoderLayer"]
    assert KanLMForCausalLM._skip_keys_device_placement == ["past_key_values", "cache"]


def plan_of(config: KanLMConfig) -> dict[str, str]:
    return {re.sub(r"\*", r"\\d+", name): kind for name, kind in config.base_model_tp_plan.items()}


def test_tensor_parallel_plan_names_real_layers(build, arm):
    """What transformers, vLLM and SGLang shard by: columns into heads and channels, rows out of them."""
    model = build(arm)
    linear = {name for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    plan = plan_of(model.config)
    kinds = {name: [kind for key, kind in plan.items() if re.fullmatch(key, name)] for name in linear}
    planned = {name for name in linear if kinds[name]}
    for name in planned:
        into_heads = name.rsplit(".", 1)[-1] not in ("o_proj", "down_proj")
        assert kinds[name] == ["colwise" if into_heads else "rowwise"], name
    attention = {name for name in linear if "self_attn" in name}
    assert attention <= planned
    # A matrix split over channels would give the functions of a group, and sums over edges, other channels.
    assert planned == (linear if arm == "swiglu" else attention)
    assert KanLMForCausalLM._tp_plan == {"lm_head": "colwise_gather_output"}


def test_pipeline_plan_names_the_base_model(build):
    model = build("kan_glu")
    children = {name for name, _ in model.model.named_children()}
    plan = model.config.base_model_pp_plan
    assert set(plan) <= children and children - set(plan) == {"rotary_emb"}
    assert list(plan) == ["embed_tokens", "layers", "norm"]
    assert KanLMForCausalLM._pp_plan == {"lm_head": (["hidden_states"], ["logits"])}
    assert KanLMForCausalLM._fsdp_plan == {"lm_head": "keep_full_weight"}


def test_structure_that_serving_engines_need(build, arm, exported):
    """vLLM's and SGLang's transformers backends: an attention interface, kwargs to the end, a base model."""
    assert KanLMForCausalLM._can_set_attn_implementation()
    assert KanLMForCausalLM._supports_attention_backend and KanLMForCausalLM.is_backend_compatible()
    assert KanLMForCausalLM._supports_flash_attn and KanLMForCausalLM._can_compile_fullgraph
    for call in (
        KanLMModel.forward,
        modeling_kanlm.KanLMDecoderLayer.forward,
        modeling_kanlm.LlamaAttention.forward,
    ):
        assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(call).parameters.values()), call
    model = build(arm)
    assert model.base_model is model.model and model.get_output_embeddings() is model.lm_head
    for index, layer in enumerate(model.model.layers):
        assert layer.self_attn.layer_idx == index and layer.self_attn.is_causal
        assert layer.self_attn.scaling == model.config.head_dim**-0.5
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) == 5 and all(norm.eps == model.config.rms_norm_eps for norm in norms)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(exported(arm), trust_remote_code=True)
    assert {"AutoModel", "AutoModelForCausalLM"} <= set(config.auto_map)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        assert isinstance(getattr(config, name), int)


def test_a_serving_engine_can_bring_its_attention_and_flat_batches(build, arm, ids):
    """As vLLM runs it: one row of all requests' tokens, positions given, its own attention, no mask."""
    seen = []

    def engine(module, query, key, value, attention_mask, scaling, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, attention_mask, attention_instances))
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("engine", engine)
    model = build(arm)
    expected = model(ids[:1]).logits
    served = AutoModelForCausalLM.from_config(model.config, attn_implementation="engine").eval()
    served.load_state_dict(model.state_dict())
    instances = {0: "a", 1: "b"}
    with torch.no_grad():
        hidden = served.model(
            input_ids=ids[:1],
            position_ids=torch.arange(20)[None],
            use_cache=False,
            attention_instances=instances,
            return_dict=False,
        )[0]
        logits = served.lm_head(hidden)
    assert seen == [(0, None, instances), (1, None, instances)]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation_serves_every_arm(build, arm, ids):
    model = build(arm)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "LinearPackedParams" in {type(part).__name__ for part in quantised.model.layers[0].mlp.modules()}
    with torch.no_grad():
        expected, found = model(ids).logits, quantised(ids).logits
    assert not torch.equal(found, expected) and (found - expected).norm() < 0.1 * expected.norm()


def test_loading_on_the_meta_device_keeps_the_basis(build, arm, ids, tmp_path):
    """from_pretrained builds on meta; one built there by hand gets its values with to_empty and a load."""
    model = build(arm)
    with torch.device("meta"):
        empty = KanLMForCausalLM(model.config)
    empty = empty.to_empty(device="cpu")
    for module in empty.modules():
        module._is_hf_initialized = False
    empty.initialize_weights()
    empty.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(empty.eval()(ids).logits, model(ids).logits)
    for name, module in empty.named_modules():
        if isinstance(module, KANLinear):
            x = torch.linspace(-4, 4, 9)[:, None].expand(-1, module.in_features)
            assert torch.equal(module.features(x), model.get_submodule(name).features(x))
