"""Each defect that kan_health is there for, put in by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kanlm.fitting import AdaptiveKAN
from kanlm.model.ffn import build_ffn
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.train.health import kan_health


def inputs(*shape, scale=1.0, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_healthy_layers():
    torch.manual_seed(0)
    model = nn.Sequential(KANLinear(4, 6), LearnedFunction(6, 2, grid_size=2))
    health = kan_health(model, inputs(3000, 4))
    assert set(health) == {"0", "1"}
    for layer in health.values():
        assert layer["dead_functions"] == layer["zero_gradients"] == layer["nonfinite"] == 0
        assert layer["outside_grid"] < 0.02
        assert 0.2 < layer["output_rms"] < 2
    assert all(parameter.grad is None for parameter in model.parameters())


def test_share_outside_the_grid():
    """On [-1, 1], a third of a normed layer's inputs."""
    x = inputs(20000, 4)
    for layer in (KANLinear(4, 2, grid_min=-1.0, grid_max=1.0), AdaptiveKAN(4, 2, knots=[-1, 0, 1])):
        share = kan_health(layer, x)[""]["outside_grid"]
        assert share == pytest.approx(0.317, abs=0.01)
        assert share == pytest.approx(float((x.abs() > 1).float().mean()))


def test_dead_functions_and_zero_gradients():
    layer = KANLinear(4, 2, grid_size=10, base=None)
    health = kan_health(layer, inputs(500, 4).clamp(0.01, 0.5))[""]  # within one interval of ten
    assert health["dead_functions"] == pytest.approx(9 / 13)
    assert health["zero_gradients"] == pytest.approx(9 / 13)
    function = LearnedFunction(4, 2, grid_size=10)
    health = kan_health(function, inputs(500, 4).clamp(0.01, 0.5))[""]
    assert health["dead_functions"] == pytest.approx(9 / 13)


def test_parameter_without_a_gradient():
    class OnlyTheFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = KANLinear(3, 3), KANLinear(3, 3)

        def forward(self, x):
            self.second(x)
            return self.first(x)

    health = kan_health(OnlyTheFirst(), inputs(3000, 3))
    assert health["first"]["zero_gradients"] == 0
    assert health["second"]["zero_gradients"] == 1


def test_nonfinite_values_are_counted():
    layer = KANLinear(3, 5)
    with torch.no_grad():
        layer.base.weight[2, 1] = float("nan")
    health = kan_health(layer, inputs(10, 3))[""]
    assert health["nonfinite"] >= 1 + 10, "one weight and an output of each row"


def test_output_scale_against_an_mlp():
    config = SimpleNamespace(
        ffn_type="kan",
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=4,
        rms_norm_eps=1e-6,
        hidden_norm=False,
        initializer_range=0.02,
        kan_basis="bspline",
        kan_grid_size=5,
        kan_order=3,
        kan_grid_min=-3.0,
        kan_grid_max=3.0,
        kan_base="silu",
        kan_conditioning="none",
    )
    block = build_ffn(config)
    health = kan_health(block, inputs(500, 64))
    assert set(health) == {"", "up_proj", "down_proj"}
    assert health[""]["scale_to_mlp"] == pytest.approx(1, abs=0.2)
    with torch.no_grad():
        for parameter in block.down_proj.parameters():
            parameter *= 8
    assert kan_health(block, inputs(500, 64))[""]["scale_to_mlp"] == pytest.approx(8, abs=1.6)


def test_loss_of_a_model_is_used_and_hooks_are_removed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = KANLinear(3, 3)

        def forward(self, x, labels):
            return SimpleNamespace(loss=(self.layer(x) - labels).square().mean(), logits=None)

    model = Model()
    health = kan_health(model, {"x": inputs(500, 3), "labels": inputs(500, 3, seed=1)})
    assert health["layer"]["zero_gradients"] == 0
    assert not model.layer._forward_hooks
    model.layer.spline.weight.requires_grad_(False)
    assert kan_health(model, {"x": inputs(500, 3), "labels": inputs(500, 3)})["layer"]["zero_gradients"] == 0
