"""B-splines on any knots against scipy and against the uniform ones."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline as ScipyBSpline

from kanlm.fitting.knots import KnotSpline, spline_values
from kanlm.model.basis import make_basis

ORDERS = range(6)


def scipy_basis(knots: np.ndarray, order: int) -> list[ScipyBSpline]:
    count = len(knots) - order - 1
    return [ScipyBSpline(knots, row, order, extrapolate=True) for row in np.eye(count)]


def random_knots(order: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaps = torch.rand(11 + order, 2, generator=generator, dtype=torch.float64) + 0.05
    return gaps.cumsum(0) - 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_splines_on_random_knots_equal_scipys(order, seed):
    knots = random_knots(order, seed)
    low, high = knots[order], knots[len(knots) - order - 1]
    generator = torch.Generator().manual_seed(seed + 10)
    x = low + torch.rand(300, 2, generator=generator, dtype=torch.float64) * (high - low)
    x = torch.cat((x, low.unsqueeze(0), high.unsqueeze(0)))  # and both edges
    values, slopes = spline_values(x, knots, order)
    torch.testing.assert_close(values.sum(-2), torch.ones_like(x), atol=1e-12, rtol=0)
    for i in range(2):
        for m, spline in enumerate(scipy_basis(knots[:, i].numpy(), order)):
            np.testing.assert_allclose(values[:, m, i], spline(x[:, i]), atol=1e-12, rtol=0)
            if order > 0:
                np.testing.assert_allclose(slopes[:, m, i], spline.derivative()(x[:, i]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_splines_on_random_knots_go_on_linearly_outside_the_grid(order):
    knots = random_knots(order, 4)
    for edge, distance in ((knots[order], -2.5), (knots[len(knots) - order - 1], 4.0)):
        at_edge, slopes = spline_values(edge.unsqueeze(0), knots, order)
        values, outside_slopes = spline_values(edge.unsqueeze(0) + distance, knots, order)
        torch.testing.assert_close(values, at_edge + distance * slopes, atol=1e-12, rtol=1e-12)
        assert torch.equal(outside_slopes, slopes)
        assert order == 0 or slopes.abs().max() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_right_edge_belongs_to_the_last_interval(order):
    knots = random_knots(order, 0)
    right = knots[len(knots) - order - 1]
    values, slopes = spline_values(right.unsqueeze(0), knots, order)
    near, near_slopes = spline_values(right.unsqueeze(0) - 1e-9, knots, order)
    torch.testing.assert_close(values, near, atol=1e-6, rtol=0)
    torch.testing.assert_close(slopes, near_slopes, atol=1e-6, rtol=0)
    assert torch.allclose(values.sum(-2), torch.ones(1, 2, dtype=torch.float64))


def test_knot_splines_on_even_knots_equal_the_uniform_ones():
    for order in ORDERS:
        basis = make_basis("bspline", 8, order, -3.0, 2.0)
        splines = KnotSpline(basis, basis.grid_points())
        x = torch.linspace(-5, 5, 333, dtype=torch.float64).unsqueeze(-1)
        torch.testing.assert_close(splines.values(x), basis.values(x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
def test_nan_stays_nan_and_empty_stays_empty(order):
    basis = make_basis("bspline", 5, order)
    splines = KnotSpline(basis, basis.grid_points().float())
    x = torch.tensor([[0.5], [float("nan")]])
    for values in (splines.values(x), splines.derivatives(x)):
        assert values[0].isfinite().all() and values[1].isnan().any()
    assert splines.values(torch.empty(0, 1)).shape == (0, splines.num_functions, 1)
