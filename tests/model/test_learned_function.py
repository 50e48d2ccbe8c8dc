"""A function per channel or group of channels: values, gradients, starts, precision."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline as ScipyBSpline
from torch.func import functional_call

from kanlm.initial import kan_coefficient_names
from kanlm.model.basis import BASES, MAX_ORDER
from kanlm.model.kan import KANLinear, LearnedFunction

FORMS = [{"basis": name} for name in (*BASES, "rational")] + [
    {"order": order} for order in range(MAX_ORDER + 1) if order != 3
]


def form_name(form: dict) -> str:
    return "-".join(str(value) for value in form.values())


def random_inputs(*shape, dtype=torch.float64, seed=0, scale=2.5) -> torch.Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        * scale
    )


def perturbed(channels=6, groups=3, dtype=torch.float64, **form) -> LearnedFunction:
    """A layer whose functions differ from group to group."""
    layer = LearnedFunction(channels, groups, **{"grid_size": 5, **form}, dtype=dtype)
    noise = random_inputs(*layer.coefficients.shape, seed=7, scale=0.1)
    with torch.no_grad():
        layer.coefficients += noise.to(dtype)
    return layer


def by_definition(layer: LearnedFunction, x: torch.Tensor) -> torch.Tensor:
    """phi channel by channel, from the formula in the docstring."""
    y = torch.empty_like(x)
    for channel in range(layer.channels):
        c = layer.coefficients[channel // (layer.channels // layer.groups)]
        at = x[..., channel]
        if layer.is_rational:
            above = sum(c[n] * at**n for n in range(6))
            below = 1 + (c[6] * at + c[7] * at**2) ** 2 + (c[8] * at + c[9] * at**2) ** 2
            value = above / below
        else:
            values = layer.basis.values(at.unsqueeze(-1)).squeeze(-1)
            value = sum(c[m] * values[..., m] for m in range(layer.num_functions))
        y[..., channel] = value + (at * torch.sigmoid(at) if layer.base else 0)
    return y


@pytest.mark.parametrize("base", [None, "silu"])
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_function_equals_its_formula(form, base):
    layer = perturbed(**form, base=base)
    x = random_inputs(4, 5, 6)
    torch.testing.assert_close(layer(x), by_definition(layer, x), atol=1e-12, rtol=1e-11)
    u = random_inputs(4, 5, 6, seed=1)
    torch.testing.assert_close(layer.gated(x, u), by_definition(layer, x) * u, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
def test_spline_functions_equal_scipys(order):
    layer = perturbed(2, 2, order=order)
    step = layer.basis.step
    knots = layer.basis.grid_min + step * np.arange(-order, layer.basis.grid_size + order + 1)
    x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 8 - 4
    for channel in range(2):
        spline = ScipyBSpline(knots, layer.coefficients[channel].detach().numpy(), order)
        np.testing.assert_allclose(layer(x)[:, channel].detach(), spline(x[:, channel]), atol=1e-12)


@pytest.mark.parametrize("basis", list(BASES))
def test_function_is_the_rank_one_case_of_edge_functions(basis):
    """c_oim = w_oi a_im: a KAN layer with such coefficients is a matrix after learned functions."""
    function = perturbed(6, 6, basis=basis, grid_min=-3.0, grid_max=3.0)
    layer = KANLinear(6, 4, basis, grid_size=5, base=None, dtype=torch.float64)
    matrix = random_inputs(4, 6, seed=3)
    with torch.no_grad():
        coefficients = matrix.unsqueeze(1) * function.coefficients.t()  # [O, K, I]
        layer.spline.weight.copy_(coefficients.flatten(1))
    x = random_inputs(9, 6)
    torch.testing.assert_close(layer(x), function(x) @ matrix.t(), atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("form", [*FORMS, {"base": "silu"}], ids=form_name)
def test_gradients(form):
    layer = perturbed(4, 2, **form)
    a, u = random_inputs(3, 4).requires_grad_(), random_inputs(3, 4, seed=1).requires_grad_()

    def gated(a, u, coefficients):
        twin = copy.copy(layer)
        twin._parameters = {"coefficients": coefficients}
        return twin.gated(a, u)

    def plain(a, coefficients):
        return functional_call(layer, {"coefficients": coefficients}, (a,))

    assert torch.autograd.gradcheck(gated, (a, u, layer.coefficients))
    assert torch.autograd.gradcheck(plain, (a, layer.coefficients))
    if form.get("order", 3) > 1 and form.get("basis") not in ("bspline", "linear"):
        assert torch.autograd.gradgradcheck(gated, (a, u, layer.coefficients))


@pytest.mark.parametrize("initial", ["silu", "gelu", "identity"])
@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        ({"grid_size": 15}, 2e-3),
        ({"basis": "linear", "grid_size": 15}, 2.5e-2),
        ({"basis": "rational"}, 2.5e-3),
        ({"basis": "rbf"}, 5e-2),
        ({"basis": "chebyshev", "grid_size": 12}, 3e-3),
    ],
    ids=str,
)
def test_start(initial, form, tolerance):
    layer = LearnedFunction(4, 2, initial=initial, **form, dtype=torch.float64)
    # Sums of bumps cannot hold a slope at the edge of their grid.
    limit = 3 if form.get("basis") == "rbf" else 4
    x = torch.linspace(-limit, limit, 500, dtype=torch.float64).unsqueeze(-1).expand(-1, 4)
    target = {"silu": F.silu, "gelu": F.gelu, "identity": lambda x: x}[initial](x)
    assert float((layer(x) - target).detach().abs().max()) < tolerance


@pytest.mark.parametrize("initial", ["identity", "silu"])
def test_start_is_the_same_every_time(initial):
    first, *others = (LearnedFunction(2, 1, initial=initial, dtype=torch.float64) for _ in range(12))
    assert all(torch.equal(other.coefficients, first.coefficients) for other in others)


def test_gelu_wave_is_gelu_and_one_wave():
    layer = LearnedFunction(2, 1, initial="gelu_wave", dtype=torch.float64)
    x = torch.linspace(-4, 4, 500, dtype=torch.float64).unsqueeze(-1).expand(-1, 2)
    wave = -0.4 * (x + 0.7) * torch.exp(-((x + 0.7) ** 2) / 2)
    assert float((layer(x) - F.gelu(x) - wave).detach().abs().max()) < 2e-3
    assert abs(float(wave.max()) - 0.4 * math.exp(-0.5)) < 1e-4  # the extrema lie one on either side of -0.7


@pytest.mark.parametrize(("initial", "error"), [("silu", 1.2e-5), ("gelu", 2.4e-3), ("identity", 1e-12)])
def test_rational_fits_are_as_good_as_stated(initial, error):
    layer = LearnedFunction(2, 1, "rational", initial=initial, dtype=torch.float64)
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64).unsqueeze(-1).expand(-1, 2)
    target = {"silu": F.silu, "gelu": F.gelu, "identity": lambda x: x}[initial](x)
    assert float((layer(x) - target).detach().abs().max()) < 1.05 * error


def test_zero_correction_is_silu_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer = LearnedFunction(6, 2, base="silu", initial="zero", dtype=dtype)
        a, u = random_inputs(500, 6).to(dtype), random_inputs(500, 6, seed=1).to(dtype)
        assert torch.equal(layer(a), F.silu(a))
        assert torch.equal(layer.gated(a, u), F.silu(a) * u)


@pytest.mark.parametrize("initial", ["identity", "silu", "gelu"])
def test_rational_denominator_is_positive_and_trains_from_the_start(initial):
    """With 1 + |q(x)| and q = 0 at the start the denominator's gradient is exactly zero, for good."""
    layer = LearnedFunction(4, 2, "rational", initial=initial)
    layer(random_inputs(200, 4).float()).sin().sum().backward()
    assert (layer.coefficients.grad != 0).all()
    with torch.no_grad():
        layer.coefficients[:, 6:] = random_inputs(2, 4, seed=5).float() * 10
        layer.coefficients[:, :6] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    values = layer(torch.linspace(-20, 20, 999).unsqueeze(-1).expand(-1, 4))
    assert (values > 0).all() and (values <= 1).all()


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_every_coefficient_has_a_gradient_at_the_start(form):
    layer = LearnedFunction(4, 2, **form, base=None if form.get("basis") == "rational" else "silu")
    layer.gated(
        random_inputs(4000, 4).float(), random_inputs(4000, 4, seed=1).float()
    ).square().sum().backward()
    assert (layer.coefficients.grad != 0).all()


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((y.double() - expected).norm() / expected.norm().clamp_min(1e-12)).detach())


@pytest.mark.parametrize("cast", ["bf16", "autocast"])
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_half_precision(form, cast):
    """No worse than twice a linear layer; under autocast, coefficients in fp32 and inputs in bf16."""
    layer = perturbed(96, 8, dtype=torch.float32, **form)
    linear = torch.nn.Linear(96, 96, bias=False)
    if cast == "bf16":
        layer, linear = layer.bfloat16(), linear.bfloat16()
    exact = copy.deepcopy(layer).double()
    a, u = (random_inputs(50, 96, seed=seed, scale=1).bfloat16().requires_grad_() for seed in (0, 1))
    wide = [tensor.detach().double().requires_grad_() for tensor in (a, u)]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        y, product = layer.gated(a, u), linear(a)
    expected = exact.gated(*wide)
    assert y.dtype == product.dtype == torch.bfloat16
    assert relative_error(y, expected) <= 2 * relative_error(product, copy.deepcopy(linear).double()(wide[0]))
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(expected))
    pairs = [(a, wide[0]), (u, wide[1]), (layer.coefficients, exact.coefficients)]
    for one, other in pairs:
        assert one.grad.dtype == one.dtype
        assert relative_error(one.grad, other.grad) < 1e-2


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_nan_inf_and_empty(form):
    layer = perturbed(4, 2, dtype=torch.float32, **form)
    x = torch.tensor([[float("nan"), 1.0, 1.0, 1e30]])
    y = layer(x)
    assert y[0, 0].isnan() and y[0, 1].isfinite() and y[0, 2].isfinite()
    if layer.is_spline and layer.basis.order > 0:  # linear outside the grid: infinite or, by 0 inf, NaN
        assert not layer(torch.tensor([[math.inf, -math.inf, math.inf, -math.inf]])).isfinite().any()
    assert layer(torch.empty(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [{"basis": name} for name in (*BASES, "rational")], ids=form_name)
def test_compiled_without_graph_breaks(form, backend):
    torch.compiler.reset()
    layer = perturbed(4, 2, dtype=torch.float32, **form)
    compiled = torch.compile(layer.gated, fullgraph=True, backend=backend)
    results = []
    for function in (layer.gated, compiled):
        layer.zero_grad()
        a, u = (random_inputs(20, 4, seed=seed).float().requires_grad_() for seed in (0, 1))
        y = function(a, u)
        y.square().sum().backward()
        results.append((y, a.grad, u.grad, layer.coefficients.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_meta_device_state_dict_pickle_and_deepcopy(form):
    with torch.device("meta"):
        layer = LearnedFunction(4, 2, **form)
    assert layer.coefficients.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.testing.assert_close(layer.coefficients, LearnedFunction(4, 2, **form).coefficients)
    layer = perturbed(4, 2, dtype=torch.float32, **{"grid_size": 16, **form})
    x = random_inputs(9, 4).float()
    other = LearnedFunction(4, 2, **form)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_coefficients_are_named_for_the_optimiser():
    model = torch.nn.ModuleDict(
        {"edge": KANLinear(3, 2), "function": LearnedFunction(4), "plain": torch.nn.Linear(2, 2)}
    )
    assert kan_coefficient_names(model) == {"edge.spline.weight", "function.coefficients"}
    assert kan_coefficient_names(LearnedFunction(4)) == {"coefficients"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups": 5}, ["groups", "5", "12"]),
        ({"groups": 0}, ["groups", "0"]),
        ({"basis": "cubic"}, ["basis", "cubic", "bspline", "rational"]),
        ({"initial": "tanh"}, ["initial", "tanh", "gelu"]),
        ({"base": "gelu"}, ["base", "gelu", "silu"]),
        ({"basis": "rational", "initial": "zero"}, ["initial", "zero", "identity"]),
        ({"grid_size": 0}, ["grid_size", "0"]),
        ({"order": 7}, ["order", "7"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        LearnedFunction(12, **arguments)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_calls_are_named():
    layer = LearnedFunction(4)
    with pytest.raises(ValueError, match=r"channels 4.*\(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"u: .*\(3, 4\).*\(3, 1\)"):
        layer.gated(torch.randn(3, 4), torch.randn(3, 1))
