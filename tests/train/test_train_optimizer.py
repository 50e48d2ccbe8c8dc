"""Schedules against hand-worked values; every parameter in the group where it belongs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kanlm.config import TrainConfig
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.train.muon import BatchedMuon, orthogonalize
from kanlm.train.optimizer import optimizers, parameter_groups
from kanlm.train.schedule import learning_rate_factor


def settings(**values) -> TrainConfig:
    return TrainConfig(**{"max_tokens": 1, "warmup_fraction": 0.1, "min_lr_ratio": 0.1} | values)


def factors(total: int, **values) -> list[float]:
    return [learning_rate_factor(step, total, settings(**values)) for step in range(total)]


def test_linear_schedule_by_hand():
    assert factors(10, schedule="linear", warmup_fraction=0.2, min_lr_ratio=0.0) == pytest.approx(
        [0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    )


def test_cosine_schedule_passes_half_way_at_the_mean_of_peak_and_end():
    found = factors(21, warmup_fraction=1 / 21)
    assert found[0] == 1 and found[-1] == pytest.approx(0.1)
    assert found[10] == pytest.approx(0.55)
    assert found[5] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_schedule_is_constant_until_the_decay():
    found = factors(20, schedule="wsd", decay_fraction=0.25)
    assert found[:2] == [0.5, 1.0] and found[2:15] == [1.0] * 13
    assert found[15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5, 0.99])
def test_every_schedule_stays_between_zero_and_the_peak(schedule, total, warmup):
    found = factors(total, schedule=schedule, warmup_fraction=warmup)
    assert all(0 < factor <= 1 for factor in found)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_step_outside_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"step: 5 lies outside \[0, 5\)"):
        learning_rate_factor(5, 5, settings())


def model(ffn_type: str, tied: bool) -> KanLMForCausalLM:
    torch.manual_seed(0)
    return KanLMForCausalLM(
        KanLMConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_type=ffn_type,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ffn_type", ["swiglu", "kan", "kan_mixed", "kan_grouped", "kan_glu", "xielu"])
def test_groups_hold_every_parameter_once(ffn_type, tied):
    built = model(ffn_type, tied)
    groups = parameter_groups(built)
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in built.named_parameters())
    assert {name for name, _ in groups["embeddings"]} == {"model.embed_tokens.weight"} | (
        set() if tied else {"lm_head.weight"}
    )
    assert all(parameter.ndim >= 2 for _, parameter in groups["matrices"])
    assert "model.norm.weight" in {name for name, _ in groups["vectors"]}
    assert bool(groups["kan"]) == ffn_type.startswith("kan")
    assert all("spline" in name or "coefficients" in name for name, _ in groups["kan"])


def test_adamw_settings_of_each_group():
    config = settings(learning_rate=0.01, weight_decay=0.3, kan_lr_multiplier=10.0, kan_betas=(0.8, 0.9))
    (adamw,) = optimizers(model("kan_glu", False), config, torch.device("cpu"))
    found = {group["name"]: group for group in adamw.param_groups}
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        "matrices": 0.3,
        "kan": 0.0,
        "embeddings": 0.0,
        "vectors": 0.0,
    }
    assert {name: round(group["peak_lr"], 9) for name, group in found.items()} == {
        "matrices": 0.01,
        "kan": 0.1,
        "embeddings": 0.01,
        "vectors": 0.01,
    }
    assert found["kan"]["betas"] == (0.8, 0.9) and found["matrices"]["betas"] == (0.9, 0.95)
    assert all(group["fused"] for group in adamw.param_groups)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    built = model("kan", False)
    muon, adamw = optimizers(built, settings(optimizer="muon"), torch.device("cpu"))
    assert isinstance(muon, torch.optim.Muon)
    groups = parameter_groups(built)
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(p) for _, p in groups["matrices"]}
    assert [group["name"] for group in adamw.param_groups] == ["kan", "embeddings", "vectors"]


@pytest.mark.parametrize(
    ("optimizer", "kan_optimizer", "of_muon"),
    [
        ("adamw", "adamw", set()),
        ("muon", "adamw", {"matrices"}),
        ("adamw", "muon", {"kan"}),
        ("muon", "muon", {"matrices", "kan"}),
    ],
)
def test_coefficients_have_an_optimizer_of_their_own(optimizer, kan_optimizer, of_muon):
    built = model("kan", tied=True)
    wanted = settings(
        optimizer=optimizer,
        kan_optimizer=kan_optimizer,
        learning_rate=1e-3,
        kan_lr_multiplier=0.5,
        weight_decay=0.1,
    )
    made = optimizers(built, wanted, torch.device("cpu"))
    groups = {group["name"]: (type(one), group) for one in made for group in one.param_groups}
    assert {name for name, (kind, _) in groups.items() if issubclass(kind, torch.optim.Muon)} == of_muon
    kan = groups["kan"][1]
    assert kan["lr"] == pytest.approx(5e-4) and kan["weight_decay"] == 0
    before = built.model.layers[0].mlp.up_proj.spline.weight.detach().clone()
    built(torch.arange(20).unsqueeze(0), labels=torch.arange(20).unsqueeze(0)).loss.backward()
    for one in made:
        one.step()
    step = built.model.layers[0].mlp.up_proj.spline.weight.detach() - before
    # An orthogonal step has singular values of one size; Adam's first is +-lr everywhere, so of low rank.
    singular = torch.linalg.svdvals(step)
    spread = float(singular[0] / singular[len(singular) // 2])
    assert (spread < 2) == ("kan" in of_muon), spread


def test_batched_muon_is_torchs():
    """Same momentum, decay and scale; torch's products are in bf16, ours here in fp32."""
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 24), (40, 24), (24, 40), (24, 24)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    more = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    one, other = BatchedMuon(ours, **more), torch.optim.Muon(theirs, **more)
    for step in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            its.grad = mine.grad.clone()
        if step == 2:
            ours[1].grad = theirs[1].grad = None  # a matrix without a gradient stays as it is
        one.step()
        other.step()
    start = [torch.linalg.vector_norm(parameter) for parameter in theirs]
    for mine, its, size in zip(ours, theirs, start, strict=True):
        assert float((mine - its).norm() / size) < 3e-3
    assert one.state_dict().keys() == other.state_dict().keys()
    fresh = BatchedMuon(ours, **more)
    fresh.load_state_dict(other.state_dict())  # a checkpoint written by torch's is read


@pytest.mark.parametrize("arm", ["gelu", "kan_act"])
def test_training_with_batched_muon_has_the_losses_of_torchs(arm):
    """Within the rounding of torch's bf16 products; both go down by far more."""
    losses: dict[type, list[float]] = {BatchedMuon: [], torch.optim.Muon: []}
    for kind, own in losses.items():
        torch.manual_seed(0)
        built = model(arm, False)
        groups = parameter_groups(built)
        matrices = [parameter for _, parameter in groups.pop("matrices")]
        rest = [parameter for named in groups.values() for _, parameter in named]
        made = [kind(matrices, lr=0.01, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=0.01)]
        ids = torch.arange(20).repeat(2, 1)
        for _ in range(20):
            loss = built(ids, labels=ids).loss
            own.append(loss.item())
            loss.backward()
            for one in made:
                one.step()
                one.zero_grad()
    ours, theirs = (torch.tensor(own) for own in losses.values())
    assert float((ours - theirs).abs().max()) < 0.02 < 0.5 < float(theirs[0] - theirs[-1])


def test_batched_muon_orthogonalises():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert 0.5 < float(singular.min()) and float(singular.max()) < 1.3


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.005), (0.002, 0.002)])
def test_coefficients_may_have_a_rate_of_their_own(rate, expected):
    config = settings(learning_rate=0.01, kan_lr_multiplier=0.5, kan_learning_rate=rate)
    groups = optimizers(model("kan_glu", True), config, torch.device("cpu"))[0].param_groups
    assert {group["name"]: group["peak_lr"] for group in groups}["kan"] == pytest.approx(expected)
