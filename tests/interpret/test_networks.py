"""The guide "coming from pykan" as it runs: train, attribute, prune, refine, name the functions."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from kanlm.interpret.networks import (
    attribute,
    auto_symbolic,
    plot,
    prune,
    refine,
    suggest_symbolic,
    symbolic_formula,
)
from kanlm.model.kan import KANLinear

GUIDE = Path(__file__).parents[2] / "docs" / "from-pykan.md"


def test_the_guides_regression_finds_its_formula():
    """The first Python block of the guide that imports kanlm, as it stands."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    block = next(block for block in blocks if "from kanlm" in block)
    names: dict = {}
    exec(block, names)
    sympy = pytest.importorskip("sympy")
    x, y, expression = names["x"], names["y"], names["formula"]
    assert {type(node).__name__ for node in sympy.preorder_traversal(expression)} >= {"exp", "sin", "Pow"}
    by_hand = sympy.lambdify(sorted(expression.free_symbols, key=str), expression, "numpy")
    difference = torch.as_tensor(by_hand(x[:, 0].numpy(), x[:, 1].numpy())) - y[:, 0]
    assert difference.square().mean().sqrt() < 0.01
    assert names["formula_rmse"] < 0.01 and names["rmse_after_refining"] < names["rmse"]


def two_layers(hidden=4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        KANLinear(3, hidden, grid_size=4, spline_share=0.5),
        KANLinear(hidden, 2, grid_size=4, spline_share=0.5),
    )


def test_scores_flow_back_from_the_outputs():
    network, x = two_layers(), torch.randn(500, 3)
    with torch.no_grad():
        for weight in network[1].parameters():
            weight.view(2, -1, 4)[:, :, 1] = 0  # nothing reads hidden node 1
    scores = attribute(network, x)
    assert [len(nodes) for nodes in scores.nodes] == [3, 4, 2]
    assert scores.nodes[1][1] == 0 and (scores.edges[0][1] == 0).all()
    assert scores.nodes[1][[0, 2, 3]].min() > 0
    torch.testing.assert_close(scores.edges[1].sum(0), scores.nodes[1])


def test_pruned_networks_are_smaller_and_the_same_without_what_went():
    network, x = two_layers(), torch.randn(500, 3)
    with torch.no_grad():
        for weight in network[1].parameters():
            weight.view(2, -1, 4)[:, :, 1] = 0
    small = prune(network, x, edge_threshold=0)
    assert small[0].out_features == small[1].in_features == 3
    torch.testing.assert_close(small(x), network(x), atol=1e-5, rtol=1e-4)
    sparse = prune(network, x, node_threshold=0, edge_threshold=0.5)
    assert (sparse[0].base.weight == 0).any() and sparse[0].base.weight.shape == network[0].base.weight.shape


def test_refined_networks_keep_their_functions():
    network, x = two_layers(), torch.randn(500, 3)
    torch.testing.assert_close(refine(network, 8)(x), network(x), atol=1e-4, rtol=1e-4)


def test_plot_shows_every_function(tmp_path):
    network, x = two_layers(), torch.randn(500, 3)
    text = plot(network, x, tmp_path / "network.html")
    assert (tmp_path / "network.html").read_text(encoding="utf-8") == text
    assert text.count("<figure>") == 3 * 4 + 4 * 2 and 'aria-label="layer 1 [1, 3]"' in text


def test_suggestions_are_ordered_by_fit_and_simplicity():
    layer = KANLinear(1, 1, grid_size=20, grid_min=-1, grid_max=1, base=None)
    points = torch.linspace(-1, 1, 400)
    with torch.no_grad():
        basis = layer.basis.values(points.unsqueeze(-1)).squeeze(-1)
        fit = torch.linalg.lstsq(basis, torch.sin(3 * points).unsqueeze(1)).solution
        layer.spline.weight.copy_(layer.spline.weight * 0 + fit.t())
    network, x = nn.Sequential(layer), points.unsqueeze(1)
    best = suggest_symbolic(network, 0, 0, 0, x, weight_simple=0.1)
    assert best[0].name == "sin" and best[0].r2 > 0.999 and abs(best[0].b) == pytest.approx(3, rel=0.02)
    assert suggest_symbolic(network, 0, 0, 0, x, weight_simple=1.0)[0].name == "x"
    with pytest.raises(ValueError, match="sinh"):
        suggest_symbolic(network, 0, 0, 0, x, lib=["sinh"])


def test_functions_without_a_formula_are_named():
    network, x = two_layers(), torch.randn(500, 3)
    with pytest.raises(ValueError, match="layer 0: no formula .* from input"):
        auto_symbolic(network, x, lib=["x"], r2_threshold=0.999999)
    with pytest.raises(ValueError, match="use auto_symbolic first"):
        symbolic_formula(network)
    with pytest.raises(ValueError, match="expected a KANLinear, got Linear"):
        attribute(nn.Sequential(nn.Linear(3, 2)), x)


def test_formulas_of_a_network_equal_the_network_of_formulas():
    sympy = pytest.importorskip("sympy")
    network, x = two_layers(hidden=2), torch.rand(500, 3) * 2 - 1
    formulas = auto_symbolic(network, x, r2_threshold=0.0)
    expressions = symbolic_formula(formulas, var=["u", "v", "w"], digits=12)
    found = [
        sympy.lambdify(sympy.symbols("u v w"), e, ["scipy", "numpy"])(*x.t().double().numpy())
        for e in expressions
    ]
    expected = formulas(x).detach().double()
    for place in range(2):
        torch.testing.assert_close(torch.as_tensor(found[place]), expected[:, place], atol=1e-3, rtol=1e-3)
    formulas(x).square().mean().backward()  # the constants can be trained
    assert all(parameter.grad is not None for parameter in formulas.parameters())
