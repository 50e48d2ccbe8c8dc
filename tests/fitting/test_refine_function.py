"""Learned functions of groups on finer grids."""

import pytest
import torch
from test_learned_function import FORMS, form_name, perturbed

from kanlm.fitting import refine_function
from kanlm.model.learned_function import LearnedFunction


@pytest.mark.parametrize("form", [form for form in FORMS if form.get("basis") != "rational"], ids=form_name)
def test_refined_grid_keeps_the_function(form):
    layer = perturbed(**form)
    x = torch.linspace(-3.99, 3.99, 300, dtype=torch.float64).unsqueeze(-1).expand(-1, 6)
    before = layer(x)
    drift = refine_function(layer, 20)
    assert layer.coefficients.shape == (3, layer.num_functions) and layer.basis.grid_size == 20
    change = float(((layer(x) - before).norm() / before.norm()).detach())
    if form.get("basis") in ("bspline", "linear", "chebyshev", "fourier") or "order" in form:
        assert change < 1e-9 and drift < 1e-9
    else:
        assert drift < 0.1 and change < 0.1


def test_bad_refits_are_named():
    layer = LearnedFunction(4)
    with pytest.raises(ValueError, match="allow_coarsen"):
        refine_function(layer, 8)
    assert refine_function(layer, 8, allow_coarsen=True) < 0.01
    with pytest.raises(ValueError, match="rational"):
        refine_function(LearnedFunction(4, basis="rational"), 32)
