"""Whitened layers: features of mean zero and variance one, the functions those of the plain coefficients."""

import pytest
import torch
import torch.nn.functional as F

from kanlm.model.basis import BASES
from kanlm.model.kan import KANLinear
from kanlm.model.whitening import assumed_points


def random_inputs(*shape, seed=0, scale=1.5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("basis", list(BASES))
@pytest.mark.parametrize("grid_size", [3, 8])
def test_features_are_white_under_the_assumed_inputs(basis, grid_size):
    layer = KANLinear(9, 2, basis, grid_size=grid_size, conditioning="whitened", dtype=torch.float64)
    points, weights = assumed_points(layer.basis.grid_points())
    assert float(weights.sum()) == pytest.approx(1)
    features = layer.features(points.expand(-1, 9))[..., 0]  # [points, K]
    mean = weights @ features
    second = torch.einsum("n,na,nb->ab", weights, features, features)
    assert mean[1:].abs().max() < 1e-10
    torch.testing.assert_close(
        second[1:, 1:], torch.eye(len(second) - 1, dtype=second.dtype), atol=1e-7, rtol=0
    )
    assert second[0, 1:].abs().max() < 1e-9
    assert float(second[0, 0]) == pytest.approx(1 / 9), "the constant of all 9 inputs counts as one feature"


def test_the_first_feature_of_a_spline_is_constant():
    layer = KANLinear(4, 2, conditioning="whitened", dtype=torch.float64)
    first = layer.features(random_inputs(50, 4, scale=4))[:, 0]
    torch.testing.assert_close(first.abs(), torch.full_like(first, 0.5), atol=1e-9, rtol=0)


@pytest.mark.parametrize("basis", list(BASES))
def test_whitened_layer_equals_the_plain_one_with_its_coefficients(basis):
    layer = KANLinear(5, 4, basis, conditioning="whitened", dtype=torch.float64)
    x = random_inputs(60, 5)
    weight = layer.spline.weight.view(4, layer.num_functions, 5)
    white = torch.einsum("jk,nki->nji", layer.whitening, layer.basis.values(x))
    by_hand = torch.einsum("oji,nji->no", weight, white) + F.silu(x) @ layer.base.weight.t()
    torch.testing.assert_close(layer(x), by_hand, atol=1e-12, rtol=1e-11)
    plain = KANLinear(5, 4, basis, dtype=torch.float64)
    plain.load_state_dict({"spline.weight": layer.plain_weight(), "base.weight": layer.base.weight})
    torch.testing.assert_close(plain(x), by_hand, atol=1e-12, rtol=1e-11)
