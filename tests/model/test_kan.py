"""A function per edge: values, gradients, precision, memory, persistence."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kanlm.model.basis import BASES, MAX_ORDER
from kanlm.model.kan import KANLinear

FORMS = [
    {"basis": name, "conditioning": conditioning} for name in BASES for conditioning in ("none", "whitened")
] + [
    {"base": None},
    *({"basis": "bspline", "order": order} for order in range(MAX_ORDER + 1) if order != 3),
]


def form_name(form: dict) -> str:
    return "-".join(str(value) for value in form.values())


def random_inputs(*shape, dtype=torch.float64, seed=0, scale=1.5) -> torch.Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        * scale
    )


def edge_by_edge(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """y_o = sum_i (w_oi silu(x_i) + sum_m c_oim B_m(x_i)), one edge after the other."""
    coefficients = layer.plain_weight().view(layer.out_features, layer.num_functions, layer.in_features)
    values = layer.basis.values(x)
    y = torch.zeros(len(x), layer.out_features, dtype=x.dtype)
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            if layer.base is not None:
                y[:, o] += layer.base.weight[o, i] * x[:, i] / (1 + torch.exp(-x[:, i]))
            for m in range(layer.num_functions):
                y[:, o] += coefficients[o, m, i] * values[:, m, i]
    return y


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_layer_equals_the_loop_over_edges(form):
    layer = KANLinear(3, 4, **form, grid_size=5, dtype=torch.float64)
    x = random_inputs(11, 3)
    torch.testing.assert_close(layer(x), edge_by_edge(layer, x), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
def test_layer_equals_the_loop_over_edges_in_every_order(order):
    layer = KANLinear(3, 4, order=order, dtype=torch.float64)
    x = random_inputs(11, 3)
    torch.testing.assert_close(layer(x), edge_by_edge(layer, x), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_gradients(form):
    layer = KANLinear(2, 2, **{"grid_size": 3, **form}, dtype=torch.float64)
    x = random_inputs(3, 2).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


def test_second_derivatives():
    layer = KANLinear(2, 2, dtype=torch.float64)
    x = random_inputs(3, 2).requires_grad_()

    def output(x, spline, base):
        return functional_call(layer, {"spline.weight": spline, "base.weight": base}, (x,))

    assert torch.autograd.gradgradcheck(output, (x, layer.spline.weight, layer.base.weight))


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_any_leading_dimensions_also_none_and_empty(form):
    layer = KANLinear(3, 4, **form)
    x = random_inputs(2, 3, 5, 3, dtype=torch.float32)
    y = layer(x)
    assert y.shape == (2, 3, 5, 4)
    torch.testing.assert_close(layer(x[1, 2, 3]), y[1, 2, 3], atol=1e-5, rtol=1e-4)
    empty = x[:0].requires_grad_()
    assert layer(empty).shape == (0, 3, 5, 4)
    layer(empty).sum().backward()
    assert torch.equal(layer.spline.weight.grad, torch.zeros_like(layer.spline.weight))


def test_transposed_inputs():
    layer = KANLinear(6, 4, dtype=torch.float64)
    x = random_inputs(6, 9)
    torch.testing.assert_close(layer(x.t()), layer(x.t().contiguous()), atol=1e-13, rtol=0)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((y.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("share", [0.05, 1.0], ids=lambda share: f"spline_share={share}")
@pytest.mark.parametrize("cast", ["bf16", "autocast"])
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_half_precision_error_is_within_twice_a_linear_layers(form, cast, share):
    """Also where all of the output comes from the splines."""
    torch.manual_seed(0)
    x = random_inputs(512, 96, dtype=torch.float32, scale=1)
    errors = []
    for layer in (nn.Linear(96, 96, bias=False), KANLinear(96, 96, **form, spline_share=share)):
        if cast == "bf16":
            layer = layer.bfloat16()
            y, exact_input = layer(x.bfloat16()), x.bfloat16().double()
        else:
            with torch.autocast("cpu", torch.bfloat16):
                y, exact_input = layer(x), x.double()
        assert y.dtype == torch.bfloat16
        errors.append(relative_error(y, copy.deepcopy(layer).double()(exact_input)))
    assert errors[1] <= 2 * errors[0], errors


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_half_precision_gradients(form):
    torch.manual_seed(0)
    layer = KANLinear(32, 24, **form).bfloat16()
    exact = copy.deepcopy(layer).double()
    x = random_inputs(300, 32, scale=1).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    weights = random_inputs(300, 24, seed=1)
    (layer(x) * weights).sum().backward()
    (exact(wide) * weights).sum().backward()
    assert relative_error(x.grad, wide.grad) < 0.02
    for one, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype == torch.bfloat16
        assert relative_error(one.grad, other.grad) < 0.02


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_meta_device_and_materialisation(form):
    with torch.device("meta"):
        layer = KANLinear(6, 5, **form)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(float("nan"))
    layer.reset_parameters()
    fresh = KANLinear(6, 5, **form)
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, dict(layer.named_buffers())[name])


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_state_dict_pickle_and_deepcopy_round_trips(form):
    layer = KANLinear(6, 5, **form)
    x = random_inputs(4, 6, dtype=torch.float32)
    other = KANLinear(6, 5, **form)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_loaded_tensors_are_not_initialised_again():
    layer = KANLinear(6, 5, conditioning="whitened")
    for tensor in (*layer.parameters(), layer.whitening):
        tensor._is_hf_initialized = True
    layer.whitening.add_(0.5)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.reset_parameters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whitening_stays_fp32_in_half_precision(dtype):
    layer = KANLinear(6, 5, grid_size=7, conditioning="whitened")
    whitening = layer.whitening.clone()
    layer = layer.to(dtype)
    assert layer.spline.weight.dtype == dtype and layer.whitening.dtype == torch.float32
    assert torch.equal(layer.whitening, whitening)
    assert layer.double().whitening.dtype == torch.float64


COMPILED = [{"basis": name} for name in BASES]
COMPILED += [{"conditioning": "whitened"}, {"base": None}]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", COMPILED, ids=form_name)
def test_compiled_without_graph_breaks(backend, form):
    torch.compiler.reset()
    layer = KANLinear(6, 5, **form)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = random_inputs(8, 6, dtype=torch.float32)
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["silu", None])
@pytest.mark.parametrize("basis", list(BASES))
def test_parameter_count(basis, base):
    layer = KANLinear(7, 5, basis, grid_size=6, base=base)
    functions = 9 if basis == "bspline" else 7
    assert layer.num_functions == functions
    assert sum(p.numel() for p in layer.parameters()) == 7 * 5 * (functions + (base is not None))


@pytest.mark.parametrize("form", FORMS, ids=form_name)
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_output_starts_at_the_scale_of_gain(form, gain):
    torch.manual_seed(0)
    x = random_inputs(2000, 200, scale=1, dtype=torch.float32)
    deviation = float(KANLinear(200, 200, **form, gain=gain)(x).detach().std())
    assert abs(deviation / gain - 1) < 0.1


def test_every_coefficient_has_a_gradient_at_the_start():
    """Also where the splines start at zero, and with inputs of which a third is off the grid."""
    for form in FORMS:
        layer = KANLinear(4, 3, **form, spline_share=0.0)
        layer(random_inputs(2000, 4, dtype=torch.float32, scale=3)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert (parameter.grad != 0).all(), (form, name)


def test_a_layer_of_lora_or_quantised_children_is_called_as_a_module():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = KANLinear(4, 3, base=None)
    x = random_inputs(5, 4, dtype=torch.float32)
    y = layer(x)
    child = Doubled(layer.spline.in_features, 3, bias=False)
    child.weight = layer.spline.weight
    layer.spline = child
    torch.testing.assert_close(layer(x), 2 * y, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_children_are_called(register):
    layer, seen = KANLinear(4, 3), []
    for child in (layer.spline, layer.base):
        getattr(child, register)(lambda *_: seen.append(1))
    layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"basis": "cubic"}, ["basis", "cubic", "bspline", "linear"]),
        ({"grid_size": 0}, ["grid_size", "0"]),
        ({"order": -1}, ["order", "-1"]),
        ({"order": 9}, ["order", "9"]),
        ({"base": "relu"}, ["base", "relu", "silu"]),
        ({"conditioning": "zca"}, ["conditioning", "zca", "whitened"]),
        ({"grid_min": 1e8, "grid_max": 1e8 + 1}, ["grid_min, grid_max", "too narrow for fp32", "widen"]),
        ({"grid_min": 0.0, "grid_max": 1e-40}, ["grid_min, grid_max", "too narrow for fp32"]),
        ({"grid_min": 2.0, "grid_max": 1.0}, ["grid_min, grid_max", "ascending", "2.0", "defaults"]),
        ({"in_features": 0}, ["in_features", "at least 1", "0"]),
        ({"out_features": -2}, ["out_features", "at least 1", "-2"]),
        ({"spline_share": 1.5}, ["spline_share", "0..1", "1.5"]),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError) as error:
        KANLinear(**{"in_features": 3, "out_features": 2, **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_wrong_last_dimension_is_named():
    with pytest.raises(ValueError, match=r"in_features 3.*\(4, 5\); pass x"):
        KANLinear(3, 2)(torch.randn(4, 5))
