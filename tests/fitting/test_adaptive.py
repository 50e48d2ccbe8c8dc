"""AdaptiveKAN: what holds of KANLinear holds of it, and its knots are checked, kept and loaded."""

import copy

import pytest
import test_kan
import torch

from kanlm import kernels
from kanlm.fitting import AdaptiveKAN

KNOTS = [-3, -1, -0.5, 0, 2, 2.5]
FORMS = [{}, {"conditioning": "whitened"}, {"knots": KNOTS}, {"order": 1, "knots": KNOTS}]
TESTS = [
    test_kan.test_layer_equals_the_loop_over_edges,
    test_kan.test_gradients,
    test_kan.test_any_leading_dimensions_also_none_and_empty,
    test_kan.test_half_precision_gradients,
    test_kan.test_meta_device_and_materialisation,
    test_kan.test_state_dict_pickle_and_deepcopy_round_trips,
]


@pytest.fixture
def adaptive(monkeypatch):
    """Tests of KANLinear build the adaptive layer."""
    monkeypatch.setattr(test_kan, "KANLinear", AdaptiveKAN)


@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
@pytest.mark.parametrize("form", FORMS, ids=test_kan.form_name)
def test_tests_of_the_layer_hold(adaptive, test, form):
    if "knots" in form and test is test_kan.test_gradients:
        form = {**form, "grid_size": 5}
    test(form)


@pytest.mark.parametrize("form", FORMS, ids=test_kan.form_name)
def test_half_precision_and_scale(adaptive, form):
    test_kan.test_half_precision_error_is_within_twice_a_linear_layers(form, "autocast", 1.0)
    test_kan.test_output_starts_at_the_scale_of_gain(form, 0.3)


def test_compiled_without_graph_breaks(adaptive):
    test_kan.test_compiled_without_graph_breaks(backend="aot_eager", form={})


def test_kernels_leave_it_to_recomputation():
    assert kernels.select(AdaptiveKAN(6, 5), "auto") == {"": "recompute"}


def test_loaded_knots_are_not_initialised_again():
    layer = AdaptiveKAN(6, 5)
    layer.knots.add_(0.5)
    layer.knots._is_hf_initialized = True
    before = layer.knots.clone()
    layer.reset_parameters()
    assert torch.equal(layer.knots, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_knots_stay_fp32_in_half_precision(dtype):
    layer = AdaptiveKAN(6, 5, grid_size=7)
    knots = layer.knots.clone()
    layer = layer.to(dtype)
    assert layer.spline.weight.dtype == dtype
    assert layer.knots.dtype == torch.float32 and torch.equal(layer.knots, knots)
    assert layer.double().knots.dtype == torch.float64


def test_knots_that_a_cast_would_merge_are_refused():
    layer = AdaptiveKAN(3, 2, knots=[0, 1, 1 + 1e-9, 2], dtype=torch.float64)
    assert layer(torch.ones(1, 3, dtype=torch.float64)).isfinite().all()
    with pytest.raises(ValueError, match="knots: some lie closer than float32.*dtype=torch.float64"):
        copy.deepcopy(layer).float()
    assert layer.bfloat16().knots.dtype == torch.float64  # buffers are kept as wide as they are


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"knots": [0, 2, 1]}, ["knots", "ascend", "[0.0, 2.0, 1.0]"]),
        ({"knots": [0, 1, 1, 2]}, ["knots", "repetition"]),
        ({"knots": [0]}, ["knots", "2"]),
        ({"knots": [0, float("nan"), 1]}, ["knots", "ascend", "nan"]),
        ({"knots": [1, 1 + 1e-9, 2]}, ["knots", "closer than float32", "dtype=torch.float64"]),
        ({"knots": [1e8, 1e8 + 1]}, ["too narrow for fp32"]),
        ({"in_features": 0}, ["in_features", "at least 1", "0"]),
        ({"order": 9}, ["order", "9"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        AdaptiveKAN(**{"in_features": 3, "out_features": 2, **arguments})
    assert all(word in str(error.value) for word in words), error.value
