import json
import re
from pathlib import Path

import pytest
import torch

from kanlm import kernels, sizing
from kanlm.config import RunConfig, TrainConfig, UserError, load_run_config, parse_table
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.model.basis import BASES, FUNCTION_BASES
from kanlm.model.configuration_kanlm import FFN_TYPES
from kanlm.model.ffn import find_arm
from kanlm.model.ffn_kan import EdgeKAN
from kanlm.train.optimizer import optimizers

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.toml") if re.match(r"(tiny|small|base|plan)-", path.name))
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def run_config(**tables) -> RunConfig:
    table = {"name": "t", "model": {"intermediate_size": 512}, "train": {"max_tokens": 100_000}} | tables
    return parse_table(RunConfig, table, "t.toml")


def variants():
    for ffn_type in FFN_TYPES:
        arm = find_arm(ffn_type)
        if arm.family != "kan":
            bases = ("bspline",)
        else:
            bases = BASES if issubclass(arm, EdgeKAN) else FUNCTION_BASES
        for basis in bases:
            yield ffn_type, basis


@pytest.mark.parametrize(("ffn_type", "basis"), list(variants()))
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"kan_base": "none", "tie_word_embeddings": False, "kan_num_groups": 4, "kan_grid_size": 5},
        {"kan_conditioning": "whitened", "kan_order": 2, "kan_glu_form": "residual", "head_dim": 6},
    ],
)
def test_closed_form_equals_the_built_model(ffn_type, basis, more):
    if more.get("kan_glu_form") == "residual" and (ffn_type, basis) == ("kan_glu", "rational"):
        pytest.skip("a rational function cannot start at zero and train")
    config = KanLMConfig(**{**SMALL, "ffn_type": ffn_type, "kan_basis": basis} | more)
    counts = sizing.parameter_counts(config)
    assert counts == sizing.built_counts(config)
    assert counts.total == counts.embedding + counts.non_embedding
    assert counts.ffn < counts.non_embedding


def test_counts_of_a_model_with_memory_by_hand():
    config = KanLMConfig(**SMALL, ffn_type="kan", kan_grid_size=5, kan_order=3)
    width, hidden, layers = 32, 48, 2
    attention = 2 * width * width + 2 * width * 16  # q, o; k, v of two heads of 8
    ffn = 2 * width * hidden * (5 + 3 + 1)
    norms = (2 * layers + 1) * width
    assert sizing.parameter_counts(config) == sizing.Counts(
        total=300 * width + layers * (attention + ffn) + norms,
        embedding=300 * width,
        non_embedding=layers * (attention + ffn) + norms,
        ffn=layers * ffn,
    )
    assert (
        sum(p.numel() for p in KanLMForCausalLM(config).parameters()) == sizing.parameter_counts(config).total
    )


@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_matrix_and_attention_flops_are_what_torch_counts(ffn_type):
    """torch's counter sees matrix products and attention, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    config = KanLMConfig(**SMALL, ffn_type=ffn_type, attn_implementation="eager")
    model = KanLMForCausalLM(config)
    model.set_attn_implementation("eager")
    batch, time = 3, 64
    ids = torch.randint(300, (batch, time), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    flops = sizing.training_flops(config, time)
    counted = counter.get_total_flops() / (batch * time)
    # Rotary angles are no product; grouped learned functions other than splines may use small ones.
    assert counted == pytest.approx(flops.matrix + flops.attention, rel=0.01)
    assert 0 < flops.elementwise < 0.25 * flops.matrix
    assert sizing.training_flops_per_token(config, time) == flops.total


def test_longer_blocks_cost_more_attention_and_nothing_else():
    config = KanLMConfig(**SMALL, ffn_type="swiglu")
    short, long = sizing.training_flops(config, 32), sizing.training_flops(config, 64)
    assert long.attention == 2 * short.attention
    assert (long.matrix, long.elementwise) == (short.matrix, short.elementwise)


@pytest.mark.parametrize("matching", ["parameters", "flops"])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
@pytest.mark.parametrize(("ours", "width"), [("kan", 57), ("kan_glu", 344), ("gelu", 516)])
def test_matched_arms_are_equally_large(ours, width, ffn_type, matching):
    config = KanLMConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=width,
        num_hidden_layers=5,
        num_attention_heads=4,
        ffn_type=ours,
        kan_grid_size=5,
        kan_num_groups=4,
    )

    def size(config):
        if matching == "parameters":
            return sum(p.numel() for p in meta(config).model.parameters()) - 4096 * 128
        return sizing.training_flops_per_token(config, 256)

    matched, mismatch = sizing.matched_width(config, ffn_type, size(config), matching, block_size=256)
    assert matched.ffn_type == ffn_type
    assert mismatch == pytest.approx(size(matched) / size(config) - 1, abs=1e-12)
    assert abs(mismatch) <= {"parameters": 0.005, "flops": 0.01}[matching]
    same = [name for name in sizing.architecture_fields() if name not in ("ffn_type", "intermediate_size")]
    assert all(getattr(matched, name) == getattr(config, name) for name in same)


def meta(config):
    with torch.device("meta"):
        return KanLMForCausalLM(config)


def test_a_width_that_cannot_match_says_why():
    config = KanLMConfig(**SMALL, ffn_type="swiglu")
    with pytest.raises(UserError, match=r"no width of kan comes within 0.5%.*alone come to"):
        sizing.matched_width(config, "kan", 5000)
    with pytest.raises(UserError, match=r"no width of kan_glu.*steps of 8, each worth 9\.\d\d%"):
        sizing.matched_width(config, "kan_glu", sizing.parameter_counts(config).non_embedding + 500)
    with pytest.raises(UserError, match="matching: expected parameters or flops"):
        sizing.matched_width(config, "kan", 50_000, "speed")


def test_sharding_divides_memory_and_ddp_does_not():
    config = KanLMConfig(**{**SMALL, "hidden_size": 256, "num_hidden_layers": 8}, ffn_type="swiglu")
    sizes = {"micro_batch_size": 2, "block_size": 64}
    one = sizing.memory_bytes(config, **sizes)
    ddp = sizing.memory_bytes(config, **sizes, devices=8, sharding="ddp")
    fsdp = sizing.memory_bytes(config, **sizes, devices=8, sharding="fsdp2")
    total = sizing.parameter_counts(config).total
    assert (one.parameters, one.gradients, one.optimizer) == (4 * total, 4 * total, 8 * total)
    assert (ddp.parameters, ddp.optimizer, ddp.buffers) == (one.parameters, one.optimizer, 4 * total)
    assert fsdp.parameters == pytest.approx(one.parameters / 8, rel=1e-3)
    assert fsdp.total < one.total < ddp.total
    checkpointed = sizing.memory_bytes(config, **sizes, gradient_checkpointing=True)
    assert checkpointed.activations < one.activations
    with pytest.raises(UserError, match="several devices need ddp or fsdp2"):
        sizing.memory_bytes(config, **sizes, devices=8)


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("hidden_norm", [False, True])
@pytest.mark.parametrize("ffn_type", FFN_TYPES)
def test_estimated_activations_are_what_autograd_keeps(ffn_type, hidden_norm, mixed_precision):
    config = KanLMConfig(
        **{**SMALL, "hidden_size": 128, "intermediate_size": 256}, ffn_type=ffn_type, hidden_norm=hidden_norm,
        kan_grid_size=5,
    )  # fmt: skip
    model = KanLMForCausalLM(config)
    kernels.select(model, "recompute")  # fused kernels keep no more
    ids = torch.randint(300, (5, 64), generator=torch.Generator().manual_seed(0))
    kept = {}

    def pack(tensor):
        if tensor.numel() >= ids.numel() and tensor.numel() % ids.numel() == 0:  # activations, not weights
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            loss = model(ids, labels=ids, use_cache=False).loss
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    layer, end = sizing._saved_bytes(config, 2 if mixed_precision else 4)
    expected = ids.numel() * (2 * layer + end + 4 * config.vocab_size)
    assert measured == pytest.approx(expected, rel=0.05)
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu", "kan_glu", "kan"])
def test_estimated_memory_is_near_the_measured_peak(ffn_type):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = KanLMConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        ffn_type=ffn_type, kan_grid_size=5, max_position_embeddings=512,
    )  # fmt: skip
    model = KanLMForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(8192, (16, 512), device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    estimate = sizing.memory_bytes(config, micro_batch_size=16, block_size=512).total
    assert estimate == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_planned(path):
    config = load_run_config(path)
    assert config.name == path.stem
    planned = sizing.plan(config)
    assert planned["parameters"] == planned["parameters_built"]
    assert json.loads(json.dumps(planned)) == planned
    text = sizing.plan_text(planned)
    assert f"{planned['parameters']['total']:,}" in text
    assert all(row["ffn_type"] in text for row in planned["matched"])


def test_arms_of_a_size_class_are_equally_large_and_trained_alike():
    arms = {"tiny": len(FFN_TYPES) + 2, "small": 3, "base": 3}  # two MLPs also with the hidden norm
    for size, number in arms.items():
        configs = [load_run_config(path) for path in SHIPPED if path.name.startswith(size)]
        assert len(configs) == number
        counts = [sizing.parameter_counts(sizing.architecture(config)).non_embedding for config in configs]
        assert max(counts) / min(counts) < 1.005
        shared = [
            config.model_dump(
                exclude={"name": True, "model": True, "train": {"kan_lr_multiplier", "kan_learning_rate"}}
            )
            for config in configs
        ]
        assert all(rest == shared[0] for rest in shared)


def test_plan_of_a_billion_parameters_gives_memory_and_days():
    planned = sizing.plan(load_run_config(CONFIGS / "plan-1b.toml"))
    assert planned["parameters"]["total"] > 1e9
    rows = {(row["devices"], row["sharding"]): row for row in planned["devices"]}
    assert set(rows) == {(1, "none"), (8, "ddp"), (8, "fsdp2"), (64, "ddp"), (64, "fsdp2")}
    days = planned["training_flops"] / (planned["peak_flops"] * planned["utilisation"]) / 86400
    assert rows[1, "none"]["days"] == pytest.approx(days)
    assert rows[64, "fsdp2"]["days"] == pytest.approx(days / 64)
    assert rows[64, "fsdp2"]["memory_bytes"]["total"] < rows[8, "fsdp2"]["memory_bytes"]["total"]
    assert planned["tokens"] == planned["steps"] * planned["tokens_per_step"] <= 20_000_000_000


@pytest.mark.parametrize(
    ("batch", "micro", "devices"), [(512, 16, {1, 8, 64}), (96, 8, {1}), (64, None, {1, 8, 64})]
)
def test_plan_shows_the_batches_that_training_takes(batch, micro, devices):
    config = run_config(train={"batch_size": batch, "micro_batch_size": micro, "max_tokens": 10**6})
    rows = sizing.plan(config)["devices"]
    assert {row["devices"] for row in rows} == devices
    for row in rows:
        assert config.train.micro_batches(row["devices"]) == (row["micro_batch_size"], row["accumulation"])


def test_architecture_takes_its_defaults_from_run_and_tokenizer():
    config = run_config(data={"block_size": 128})
    found = sizing.architecture(config, 1000, eos_token_id=7)
    assert (found.vocab_size, found.max_position_embeddings, found.eos_token_id) == (1000, 128, 7)
    config = run_config(model={"vocab_size": 1024, "max_position_embeddings": 512, "intermediate_size": 512})
    found = sizing.architecture(config, 1000)
    assert (found.vocab_size, found.max_position_embeddings) == (1024, 512)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 128}, r"model\.hiden_size: unknown key; did you mean 'hidden_size'\?"),
        ({"zzz": 1}, r"model\.zzz: unknown key; known: .*ffn_type"),
        ({"format_version": 1}, r"model\.format_version: unknown key"),
        ({"hidden_size": "wide"}, r"model.*hidden_size.*expected int"),
        ({"hidden_size": 130}, r"model\.hidden_size: 130 is not a multiple of num_attention_heads 4"),
        ({"ffn_type": "mlp"}, r"model\.ffn_type: unknown value 'mlp'"),
        ({"vocab_size": 999}, r"model\.vocab_size: got 999, but the tokenizer has 1000"),
        ({"max_position_embeddings": 255}, r"data\.block_size: got 256, more than .* 255"),
    ],
)
def test_mistakes_in_the_model_table_are_one_line(model, message):
    with pytest.raises(UserError, match=message) as caught:
        sizing.architecture(run_config(model={"intermediate_size": 512} | model), 1000)
    assert "\n" not in str(caught.value)


def test_a_budget_below_one_step_is_an_error():
    with pytest.raises(UserError, match="train.max_tokens: 4095 is less than one step of .* = 4096 tokens"):
        sizing.plan(run_config(train={"max_tokens": 4095}))


@pytest.mark.parametrize("kan_optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ffn_type", ["gelu", "kan", "kan_mixed", "kan_grouped", "kan_glu"])
def test_planned_optimizer_state_is_the_real_one(ffn_type, optimizer, kan_optimizer):
    config = KanLMConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        ffn_type=ffn_type, kan_num_groups=4, kan_grid_size=4, max_position_embeddings=16,
    )  # fmt: skip
    model = KanLMForCausalLM(config)
    settings = TrainConfig(max_tokens=1, optimizer=optimizer, kan_optimizer=kan_optimizer)
    made = optimizers(model, settings, torch.device("cpu"))
    ids = torch.arange(16).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    real = 0
    for one in made:
        one.step()
        states = (state for of in one.state.values() for state in of.values())
        real += sum(4 * state.numel() for state in states if torch.is_tensor(state) and state.ndim)
    planned = sizing.memory_bytes(
        config, micro_batch_size=1, block_size=16, optimizer=optimizer, kan_optimizer=kan_optimizer
    ).optimizer
    assert planned == pytest.approx(real, rel=0.01)  # vectors stay with AdamW; the plan counts them to Muon


def test_the_version_that_wrote_a_config_is_no_choice():
    assert "kanlm_version" not in sizing.architecture_fields()
