"""Each defect that made published KAN layers untrainable, put back in: the test that guards against it fails.

A guard is a test of this folder, called as it stands; first without the defect, when it passes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import test_basis
import test_ffn
import test_kan
import test_learned_function
import test_refit
import torch

from kanlm.fitting import adaptive, refit
from kanlm.model import KanLMConfig, basis, ffn
from kanlm.model.basis import BSpline, Rational, per_channel
from kanlm.model.ffn_kan import EdgeKAN
from kanlm.model.kan import KANLinear
from kanlm.model.modeling_kanlm import KanLMDecoderLayer


def denominator_without_gradient(patch):
    """Q = 1 + (0)^2: right values for SiLU's numerator, and q = 0 never moves."""
    for name, (numerator, denominator) in basis.RATIONAL_FITS.items():
        patch.setitem(basis.RATIONAL_FITS, name, (numerator, (0.0,) * len(denominator)))


def other_denominator_than_the_fits(patch):
    """P / (1 + |q_0 x + q_1 x^2| + |q_2 x + q_3 x^2|) with coefficients that were fitted to squares."""

    def combine(function, coefficients, x):
        c = per_channel(coefficients, x.shape[-1])
        above = sum(c[n] * x**n for n in range(6))
        first, second = (c[6] + c[7] * x) * x, (c[8] + c[9] * x) * x
        return above / (1 + first.abs() + second.abs())

    patch.setattr(Rational, "combine", combine)


def knots_moved_without_a_refit(patch):
    def moved(layer, basis, samples, is_exact=False):
        before = layer(samples)
        layer.basis = basis
        return float((layer(samples) - before).norm() / before.norm())

    patch.setattr(adaptive, "change_basis", moved)


def refined_without_a_refit(patch):
    """The coefficients of the old grid, repeated on the new one."""
    change_basis = refit.change_basis

    def refined(layer, *arguments, **more):
        old = refit.plain_coefficients(layer)
        drift = change_basis(layer, *arguments, **more)
        refit.set_coefficients(layer, old[:, torch.arange(layer.num_functions) % old.shape[1]])
        return drift

    patch.setattr(refit, "change_basis", refined)


def only_the_last_layer_counts(patch):
    """Every layer of the loop reads the embedding instead of the layer before it."""
    forward = KanLMDecoderLayer.forward
    first = {}

    def overwritten(layer, hidden_states, *args, **kwargs):
        if layer.self_attn.layer_idx == 0:
            first["embedding"] = hidden_states
        return forward(layer, first["embedding"], *args, **kwargs)

    patch.setattr(KanLMDecoderLayer, "forward", overwritten)


def a_third_of_the_inputs_off_the_grid(patch):
    init = KanLMConfig.__init__

    def narrow(config, *args, **kwargs):
        init(config, *args, **{"kan_grid_min": -1.0, "kan_grid_max": 1.0, **kwargs})

    patch.setattr(KanLMConfig, "__init__", narrow)


def inputs_off_the_grid_are_ignored(patch):
    values = BSpline.values

    def zero_outside(basis, x):
        outside = (x < basis.grid_min) | (x > basis.grid_max)
        return values(basis, x).masked_fill(outside.unsqueeze(-2), 0)

    patch.setattr(BSpline, "values", zero_outside)


def right_edge_is_lost(patch):
    """Half-open intervals."""
    values = BSpline.values
    patch.setattr(
        BSpline,
        "values",
        lambda basis, x: values(basis, x).masked_fill((x == basis.grid_max).unsqueeze(-2), 0),
    )


def branch_starts_at_eight_times_the_mlps_scale(patch):
    scale = ffn.FeedForward.gelu_scale
    patch.setattr(EdgeKAN, "gelu_scale", lambda block: 8 * scale(block))


def fan_in_without_the_functions(patch):
    """Coefficients of standard deviation I^(-1/2), whatever the number of basis functions."""
    reset = KANLinear.reset_parameters

    def scaled(layer):
        reset(layer)
        with torch.no_grad():
            layer.spline.weight.normal_(std=layer.in_features**-0.5)

    patch.setattr(KANLinear, "reset_parameters", scaled)


def edge_coefficients_are_not_trained(patch):
    """Their gradient is exactly zero."""
    features = KANLinear.features
    patch.setattr(KANLinear, "features", lambda layer, x: 0 * features(layer, x))


def function_coefficients_are_not_trained(patch):
    table = BSpline.table
    patch.setattr(BSpline, "table", lambda grid, c: table(grid, c).detach() + 0 * table(grid, c))


def basis_in_half_precision(patch):
    """What evaluating in bf16 loses."""
    values = BSpline.values
    patch.setattr(BSpline, "values", lambda basis, x: values(basis, x).bfloat16().float())


@dataclass(frozen=True)
class Defect:
    put_in: Callable
    guard: Callable
    arguments: tuple = ()


DEFECTS = [
    Defect(
        denominator_without_gradient,
        test_learned_function.test_rational_denominator_is_positive_and_trains_from_the_start,
        ("silu",),
    ),
    Defect(
        denominator_without_gradient,
        test_learned_function.test_every_coefficient_has_a_gradient_at_the_start,
        ({"basis": "rational"},),
    ),
    Defect(
        other_denominator_than_the_fits,
        test_learned_function.test_rational_fits_are_as_good_as_stated,
        ("silu", 1.2e-5),
    ),
    Defect(
        other_denominator_than_the_fits,
        test_learned_function.test_function_equals_its_formula,
        ({"basis": "rational"}, None),
    ),
    Defect(knots_moved_without_a_refit, test_refit.test_moved_grid_refits_the_coefficients),
    Defect(refined_without_a_refit, test_refit.test_refined_grid_keeps_the_function, (3, "uniform", "none")),
    Defect(only_the_last_layer_counts, test_ffn.test_every_layer_of_a_model_counts, ("kan",)),
    Defect(only_the_last_layer_counts, test_ffn.test_every_layer_of_a_model_counts, ("kan_glu",)),
    Defect(
        a_third_of_the_inputs_off_the_grid,
        test_ffn.test_inputs_of_a_model_as_configured_by_default_are_on_the_grid,
        ("kan",),
    ),
    Defect(
        inputs_off_the_grid_are_ignored,
        test_ffn.test_inputs_of_edge_functions_are_on_the_grid_and_train_beyond_it,
        ("kan",),
    ),
    Defect(inputs_off_the_grid_are_ignored, test_basis.test_splines_go_on_linearly_outside_the_grid, (3, 1)),
    Defect(right_edge_is_lost, test_basis.test_right_edge_belongs_to_the_last_interval, (3,)),
    Defect(
        branch_starts_at_eight_times_the_mlps_scale,
        test_ffn.test_branch_starts_at_the_scale_of_the_mlp,
        ("kan", {}),
    ),
    Defect(
        fan_in_without_the_functions,
        test_kan.test_output_starts_at_the_scale_of_gain,
        ({"conditioning": "whitened"}, 1.0),
    ),
    Defect(edge_coefficients_are_not_trained, test_kan.test_every_coefficient_has_a_gradient_at_the_start),
    Defect(
        edge_coefficients_are_not_trained,
        test_ffn.test_block_maps_btd_to_btd_and_trains_every_parameter,
        ("kan",),
    ),
    Defect(
        function_coefficients_are_not_trained,
        test_ffn.test_block_maps_btd_to_btd_and_trains_every_parameter,
        ("kan_glu",),
    ),
    Defect(
        basis_in_half_precision,
        test_basis.test_half_precision_is_evaluated_in_fp32,
        ("bspline", torch.bfloat16),
    ),
]


@pytest.mark.parametrize(
    "defect", DEFECTS, ids=lambda defect: f"{defect.put_in.__name__}-{defect.guard.__name__}"
)
def test_a_defect_that_comes_back_is_caught(defect, monkeypatch):
    arguments = copy.deepcopy(defect.arguments)
    defect.guard(*arguments)
    defect.put_in(monkeypatch)
    with pytest.raises(AssertionError):
        defect.guard(*arguments)
