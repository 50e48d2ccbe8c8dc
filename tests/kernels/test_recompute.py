"""Recomputation: the reference's results to rounding, with the basis values of a few rows alive at a time."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kanlm import kernels
from kanlm.fitting import AdaptiveKAN
from kanlm.kernels import recompute
from kanlm.model.basis import BASES
from kanlm.model.kan import KANLinear, LearnedFunction

EDGES = [lambda basis=basis: KANLinear(7, 5, basis, dtype=torch.float64) for basis in BASES]
EDGES += [
    lambda: KANLinear(7, 5, conditioning="whitened", dtype=torch.float64),
    lambda: KANLinear(7, 5, base=None, dtype=torch.float64),
    lambda: AdaptiveKAN(7, 5, dtype=torch.float64),
]
FUNCTIONS = [
    lambda basis=basis: LearnedFunction(6, 3, basis, dtype=torch.float64) for basis in (*BASES, "rational")
]


@pytest.fixture(params=[3, 100], ids=["chunks", "one chunk"])
def rows(request, monkeypatch):
    """Rows in a chunk: the last of the smaller ones is short."""
    monkeypatch.setattr(recompute, "chunk_rows", lambda layer, x: request.param)


def random_inputs(*shape, dtype=torch.float64, seed=0) -> torch.Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def results(layer: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of inputs and parameters."""
    layer.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = layer(*leaves)
    y.square().sum().backward()
    return [y, *(x.grad for x in leaves), *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("build", EDGES)
def test_edge_layer_equals_the_reference(build, rows):
    layer, x = build(), random_inputs(2, 5, 7)
    expected = results(layer, x)
    assert kernels.select(layer, "recompute") == {"": "recompute"}
    torch.testing.assert_close(results(layer, x), expected, atol=1e-12, rtol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected[0], atol=1e-12, rtol=1e-11)
        assert layer(x[:0]).shape == (0, 5, 5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("build", FUNCTIONS)
def test_learned_function_equals_the_reference(build, gated, rows):
    layer, inputs = build(), [random_inputs(2, 5, 6, seed=seed) for seed in range(1 + gated)]
    expected = results(layer, *inputs)
    assert kernels.select(layer, "recompute") == {"": "recompute"}
    torch.testing.assert_close(results(layer, *inputs), expected, atol=1e-12, rtol=1e-11)


def test_second_derivatives(rows):
    layer = KANLinear(2, 2, dtype=torch.float64)
    kernels.select(layer, "recompute")
    x = random_inputs(4, 2).requires_grad_()

    def output(x, spline, base):
        return functional_call(layer, {"spline.weight": spline, "base.weight": base}, (x,))

    assert torch.autograd.gradgradcheck(output, (x, layer.spline.weight, layer.base.weight))


def test_autocast_and_half_precision_are_the_references(rows):
    layer, x = KANLinear(7, 5, conditioning="whitened"), random_inputs(10, 7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(layer, x)
        kernels.select(layer, "recompute")
        got = results(layer, x)
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.02)


def test_adapters_and_their_dropout_are_used(rows):
    """Masks drawn again in backward would give gradients of another function."""

    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * nn.functional.dropout(super().forward(x), 0.5, training=True)

    layer, x = KANLinear(7, 5, base=None, dtype=torch.float64), random_inputs(10, 7)
    layer.spline.__class__ = Adapted
    assert kernels.select(layer, "auto") == {"": "recompute"}
    leaf = x.requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    step = 1e-6 * random_inputs(10, 7, seed=1)
    values = []
    for at in (x + step, x - step):
        torch.manual_seed(0)
        values.append(float(layer(at).sum().detach()))
    assert float((gradient * step).sum()) == pytest.approx((values[0] - values[1]) / 2, rel=1e-4)


@pytest.mark.parametrize("build", [
    lambda: KANLinear(64, 8, grid_size=20),
    lambda: LearnedFunction(64, 8, "rbf", grid_size=20),
])  # fmt: skip
def test_basis_values_are_never_all_alive(build):
    """4096 rows: no tensor of the whole expansion [4096, K, I] is ever made."""
    layer = build()
    kernels.select(layer, "recompute")
    x = random_inputs(4096, 64, dtype=torch.float32).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        layer(x).sum().backward()
    assert 4096 * 64 <= largest < 4096 * layer.num_functions * 64 / 4


def test_a_model_to_be_compiled_keeps_the_reference():
    assert kernels.select(KANLinear(4, 3, "chebyshev"), "auto", compiled=True) == {"": "reference"}
