"""Tables in the place of learned functions and edge functions: the same outputs."""

import pytest
import torch

from kanlm.edge.functions import (
    MAX_SAMPLED,
    STEPS,
    GraphEdges,
    GraphFunction,
    SampledFunction,
    graph_module,
    with_graph_functions,
)
from kanlm.fitting import AdaptiveKAN
from kanlm.model.kan import KANLinear
from kanlm.model.learned_function import LearnedFunction

POINTS = torch.cat((torch.linspace(-9, 9, 200), torch.tensor([-4.0, 4.0, -1.0, 0.0]))).view(17, 12)


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("groups, base", [(1, None), (3, "silu"), (12, None)])
def test_function_is_that_of_its_table(order, groups, base):
    function = LearnedFunction(12, groups, order=order, grid_size=8, base=base)
    torch.nn.init.normal_(function.coefficients)
    other = torch.randn_like(POINTS)
    with torch.no_grad():
        expected, gated = function(POINTS), function.gated(POINTS, other)
        graph = GraphFunction(function)
        torch.testing.assert_close(graph(POINTS), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(graph.gated(POINTS, other), gated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("base", [None, "silu"])
def test_edges_are_those_of_their_table(order, conditioning, base):
    layer = KANLinear(12, 7, order=order, grid_size=6, conditioning=conditioning, base=base)
    torch.nn.init.normal_(layer.spline.weight, std=0.3)
    with torch.no_grad():
        torch.testing.assert_close(GraphEdges(layer)(POINTS), layer(POINTS), atol=2e-5, rtol=1e-4)


def test_only_splines_are_replaced_and_the_model_is_left_alone():
    model = torch.nn.Sequential(KANLinear(4, 4), KANLinear(4, 4, "rbf"), LearnedFunction(4, basis="rational"))
    kinds = [type(module).__name__ for module in with_graph_functions(model)]
    assert kinds == ["GraphEdges", "KANLinear", "LearnedFunction"]
    assert type(model[0]) is KANLinear
    assert graph_module(AdaptiveKAN(4, 4)) is None
    sampled = with_graph_functions(model, sampled=True)
    assert [type(module).__name__ for module in sampled] == ["GraphEdges", "KANLinear", "SampledFunction"]
    many = LearnedFunction(MAX_SAMPLED + 1)
    assert type(graph_module(many, sampled=True)) is GraphFunction


@pytest.mark.parametrize("basis, base", [("bspline", None), ("bspline", "silu"), ("rational", None)])
def test_sampled_function_is_within_its_bound(basis, base):
    function = LearnedFunction(12, 3, basis, base=base)
    torch.nn.init.normal_(function.coefficients[:, :5], std=0.2)
    x = torch.linspace(-30, 30, 6001).unsqueeze(-1).expand(-1, 12)
    with torch.no_grad():
        expected, found = function(x), SampledFunction(function)(x)
        slope, d = (expected.diff(dim=0) / 0.01).abs().max(), 1 + x.abs()
        assert ((found - expected).abs() <= 1.01 * slope * d**2 / (2 * STEPS - d) + 1e-4).all()
        ends, near = torch.tensor([[1e30], [-1e30]]), torch.tensor([[1000.0], [-1000.0]])
        sampled = SampledFunction(function)
        assert torch.equal(sampled(ends.expand(-1, 12)), sampled(near.expand(-1, 12)))
