"""How well KANs fit known functions: least-squares optima and the published series under grid refinement."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import scipy.special
import torch

from kanlm.fitting import whiten
from kanlm.model.kan import KANLinear

GRID_SIZES = (5, 10, 20, 50, 100)
OPTIMA = {
    "J0(20x)": (
        lambda x: torch.tensor(scipy.special.j0(20 * x.numpy())),
        (2.81e-1, 1.91e-1, 8.09e-3, 9.00e-5, 4.76e-6),
    ),
    "sin(pi x)": (lambda x: torch.sin(math.pi * x), (2.66e-3, 1.17e-4, 6.54e-6, 1.61e-7, 1.00e-8)),
    "exp(sin(pi x))": (
        lambda x: torch.exp(torch.sin(math.pi * x)),
        (3.06e-2, 1.57e-3, 4.82e-5, 9.91e-7, 6.00e-8),
    ),
}


@pytest.mark.parametrize("conditioning", ["none", "whitened"])
@pytest.mark.parametrize("name", list(OPTIMA))
def test_least_squares_optimum_of_one_edge(name, conditioning):
    function, expected = OPTIMA[name]
    x = torch.linspace(-1, 1, 5001, dtype=torch.float64).unsqueeze(-1)
    y = torch.as_tensor(function(x))
    for grid_size, error in zip(GRID_SIZES, expected, strict=True):
        layer = KANLinear(
            1,
            1,
            grid_size=grid_size,
            grid_min=-1.0,
            grid_max=1.0,
            base=None,
            conditioning=conditioning,
            dtype=torch.float64,
        )
        with torch.no_grad():
            features = layer.features(x).flatten(1)
            layer.spline.weight.copy_(torch.linalg.lstsq(features, y).solution.t())
            reached = float((layer(x) - y).square().mean().sqrt())
        assert reached == pytest.approx(error, rel=0.05), grid_size


def fit_functions():
    """scripts/fit_functions.py as a module."""
    path = Path(__file__).parents[2] / "scripts" / "fit_functions.py"
    spec = importlib.util.spec_from_file_location("fit_functions", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fit_functions"] = module
    spec.loader.exec_module(module)
    return module


def test_gradient_descent_converges_in_white_coordinates():
    """One edge, sin(pi x), 15 intervals, from zero, 200 steps; plain coefficients are badly conditioned."""
    x = torch.linspace(-1, 1, 400, dtype=torch.float64).unsqueeze(-1)
    y = torch.sin(math.pi * x)
    errors = {}
    for conditioning in ("none", "whitened"):
        layer = KANLinear(
            1,
            1,
            grid_size=15,
            grid_min=-1.0,
            grid_max=1.0,
            base=None,
            conditioning=conditioning,
            dtype=torch.float64,
        )
        if conditioning == "whitened":
            whiten(layer, x)
        torch.nn.init.zeros_(layer.spline.weight)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        errors[conditioning] = float((layer(x) - y).square().mean().sqrt().detach())
    assert errors["whitened"] < 1e-4 and errors["none"] > 5e-3


def test_mlp_and_kan_interpolation_of_parameters_for_equal_error():
    module = fit_functions()
    sizes, errors = (10, 1000, 2000), (1e-1, 1e-3, 2e-3)
    fits = [module.Fit((1, 1), size, 0, error) for size, error in zip(sizes, errors, strict=True)]
    assert module.parameters_for(fits, 0.2) == 10
    assert module.parameters_for(fits, 1e-2) == pytest.approx(100)
    assert module.parameters_for(fits, 1e-3) == pytest.approx(1000)
    assert module.parameters_for(fits, 1e-4) == math.inf


def test_committed_page_says_what_the_script_does():
    """Its text and tables are the script's, for the committed fits."""
    module, docs = fit_functions(), Path(__file__).parents[2] / "docs"
    kan, mlp = (
        {
            name: [module.Fit(**fit | {"widths": tuple(fit["widths"])}) for fit in fits]
            for name, fits in by_name.items()
        }
        for by_name in json.loads((docs / "fit_functions.json").read_text(encoding="utf-8")).values()
    )
    assert module.report(kan, mlp) == (docs / "fit_functions.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["kan", "mlp"])
def test_jacobian_of_the_fits_is_that_of_autograd(kind):
    module = fit_functions()
    model = module.new_kan((2, 3, 1), 3, 0) if kind == "kan" else module.new_mlp((2, 4, 3, 1), 1)
    x = torch.rand(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    y, rows = module.jacobian(model, x)
    torch.testing.assert_close(y, model(x).detach())
    for output, row in zip(model(x), rows, strict=True):
        gradients = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(row, torch.cat([g.flatten() for g in gradients]), atol=1e-12, rtol=1e-10)


def test_levenberg_marquardt_reaches_the_optimum_of_a_linear_problem():
    module = fit_functions()
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(-1)
    y = torch.sin(3 * x)
    model = module.new_kan((1, 1), 6, 0)
    with torch.no_grad():
        features = model[0].features(x).flatten(1)
        optimum = (features @ torch.linalg.lstsq(features, y).solution - y).square().mean().sqrt()
    module.levenberg_marquardt(model, x, y, 30)
    assert module.rmse(model, x, y) == pytest.approx(float(optimum), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1], ids=["[2,1,1]", "[4,2,1,1]"])
def test_errors_keep_falling_under_grid_refinement(index):
    module = fit_functions()
    series = module.SERIES[index]
    fits = module.series_fits(series)
    errors = [fit.test_rmse for fit in fits]
    assert all(fine < coarse for coarse, fine in zip(errors, errors[1:], strict=False)), errors
    for grid_size, error, published in zip(series.target.grid_sizes, errors, series.published, strict=True):
        assert error <= published, (grid_size, errors)
