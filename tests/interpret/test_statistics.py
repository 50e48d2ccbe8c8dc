"""Statistics of functions against their definitions, and controls that must and must not differ."""

import pytest
import torch

from kanlm.interpret.layers import FunctionLayer, record_layers, replaced
from kanlm.interpret.removal import ClosedForms, lines_of, sequence_losses, start_of
from kanlm.interpret.statistics import (
    agreement,
    first_order_effect,
    function_outputs,
    function_statistics,
    importance_of,
    middle_quantiles,
    sign_flip_p,
    token_share,
)
from kanlm.interpret.symbolic import fit_functions
from kanlm.model.kan import KANLinear, LearnedFunction


def edges(n=400, gradients=True) -> FunctionLayer:
    torch.manual_seed(0)
    layer = KANLinear(4, 3, "bspline", grid_size=5, spline_share=0.5)
    return FunctionLayer("edges", layer, torch.randn(n, 4), None, torch.randn(n, 3) if gradients else None)


def groups(n=400) -> FunctionLayer:
    torch.manual_seed(0)
    layer = LearnedFunction(6, groups=3)
    return FunctionLayer("groups", layer, torch.randn(n, 6), torch.randn(n, 6), torch.randn(n, 6))


def test_importance_is_variance_and_a_line_has_no_nonlinear_share():
    x = torch.linspace(-2, 2, 33).expand(3, -1)
    y = torch.stack([3 * x[0] + 1, x[1].square(), x[2] + x[2].square()])
    variance, left = (found.squeeze(1) for found in importance_of(x, y.unsqueeze(-1)))
    torch.testing.assert_close(variance, y.var(-1, correction=0))
    assert left[0] < 1e-5 * variance[0]
    assert left[1] == pytest.approx(variance[1].item(), rel=1e-4)
    assert left[2] == pytest.approx(variance[1].item(), rel=1e-4)


def test_quantiles_stand_for_the_inputs():
    rows = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0])
    found = middle_quantiles(rows)
    assert found.shape == (33, 2)
    torch.testing.assert_close(found.std(0), rows.std(0), rtol=0.05, atol=0)


def test_effect_of_edges_is_the_root_mean_square_of_gradient_times_deviation():
    layer = edges()
    phi = layer.values(layer.x)  # [I, N, O]
    expected = (layer.gradient * (phi - phi.mean(1, keepdim=True))).square().mean(1).sqrt()
    torch.testing.assert_close(first_order_effect(layer), expected, rtol=1e-4, atol=1e-5)


def test_effect_of_a_group_adds_its_channels():
    layer = groups()
    phi = layer.module(layer.x).detach()
    deviation = phi - phi.view(-1, 3, 2).mean((0, 2)).repeat_interleave(2)
    moved = (layer.gradient * layer.factor * deviation).view(-1, 3, 2).sum(-1)
    torch.testing.assert_close(first_order_effect(layer).squeeze(1), moved.square().mean(0).sqrt())


def test_outputs_of_single_functions_are_the_layers():
    layer = edges()
    values = layer.values(layer.x)
    found = function_outputs(layer, [2, 7])  # edges (input 0, output 2) and (input 2, output 1)
    torch.testing.assert_close(found.squeeze(-1), torch.stack([values[0, :, 2], values[2, :, 1]], 1))
    layer = groups()
    torch.testing.assert_close(function_outputs(layer, [1])[:, 0], layer.module(layer.x)[:, 2:4])


def test_saturation_and_grid_are_seen():
    layer = edges()
    with torch.no_grad():
        layer.module.base.weight.zero_()
        layer.module.spline.weight.zero_()
        layer.module.spline.weight.view(3, -1, 4)[0, 0, 0] = 1.0  # a function that is flat right of -2
    layer.x[:40, 1] = 9.0
    found = function_statistics(layer)
    assert found.saturated[0, 0] > 0.7
    assert found.outside_grid == pytest.approx(((layer.x < -3) | (layer.x > 3)).float().mean().item())


def test_agreement_is_a_rank_correlation():
    found = function_statistics(edges())
    found.effect = found.variance.sqrt() * 3
    assert agreement(found) == pytest.approx(1)
    found.effect = 1 / found.variance
    assert agreement(found) == pytest.approx(-1)


def test_token_share_is_high_only_where_the_token_decides():
    layer = edges(4000)
    tokens = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(1))
    assert abs(token_share(layer, function_statistics(layer), tokens)) < 0.02
    layer.x = torch.randn(20, 4)[tokens]
    assert token_share(layer, function_statistics(layer), tokens) == pytest.approx(1, abs=1e-4)


def test_sign_flip_test_is_exact():
    assert sign_flip_p([1.0] * 8) == pytest.approx(2 / 256)
    assert sign_flip_p([1.0, -1.0, 1.0, -1.0]) == 1.0
    assert sign_flip_p([3.0, 1.0, 2.0]) == pytest.approx(2 / 8)
    assert sign_flip_p([0.0] * 5) == 1.0 and sign_flip_p([1.0, 2.0]) is None


def test_a_model_against_models_like_itself_is_not_significant_too_often():
    generator = torch.Generator().manual_seed(2)
    draws = torch.randn(300, 8, generator=generator).tolist()
    assert sum(sign_flip_p(row) <= 0.05 for row in draws) <= 25  # 15 expected


@pytest.mark.parametrize("ffn_type", ["kan", "kan_mixed", "kan_glu", "kan_grouped"])
def test_replacements_are_what_they_say(ffn_type, model):
    network = model(ffn_type)
    ids = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    layer = record_layers(network, ids)[-1]
    found = function_statistics(layer)
    forms = fit_functions(found.x, found.y, weight=0.0)
    x = layer.x[:50]
    if layer.kind == "edge":
        by_hand = sum(forms.formula(i, o)(x[:, i].numpy()) for i in range(layer.inputs) for o in range(1))
        closed = ClosedForms(layer, forms, torch.ones_like(forms.r2, dtype=torch.bool))(x)[:, 0]
        torch.testing.assert_close(closed.double(), torch.as_tensor(by_hand), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(start_of(layer)(x), layer.module.base(torch.nn.functional.silu(x)))
    nothing = ClosedForms(layer, forms, torch.zeros_like(forms.r2, dtype=torch.bool))
    torch.testing.assert_close(nothing(x), layer.module(x))
    half = torch.zeros_like(forms.r2, dtype=torch.bool)
    half[::2] = True
    values, learned = forms.values(layer.samples()[:50].double()), layer.values(layer.samples()[:50])
    if layer.size == 1:
        mixed = torch.where(half.unsqueeze(1), values.transpose(0, 1).float(), learned)
        torch.testing.assert_close(ClosedForms(layer, forms, half)(x), mixed.sum(0), atol=1e-4, rtol=1e-4)
    line = lines_of(layer, found)(x)
    with torch.no_grad(), replaced(layer.module, lines_of(layer, found)):
        torch.testing.assert_close(layer.module(x), line)
    plain = sequence_losses(network, ids)
    width = layer.gradient.shape[-1]
    with replaced(layer.module, lambda x: x.new_zeros(*x.shape[:-1], width)):
        assert (sequence_losses(network, ids) - plain).abs().max() > 1e-5
    assert torch.equal(sequence_losses(network, ids), plain)
