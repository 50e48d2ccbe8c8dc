"""The CPU kernels against the reference: forward and every gradient."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kanlm import kernels
from kanlm.fitting import refine, refine_function
from kanlm.kernels import cpu, native
from kanlm.model.configuration_kanlm import KanLMConfig
from kanlm.model.ffn import build_ffn
from kanlm.model.kan import KANLinear, LearnedFunction

try:
    native.library()
except native.NativeUnavailable as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}


def close(got, expected, tolerance, what):
    """Largest error over the largest value."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, (what, got.shape, got.dtype)
    got, expected = got.double(), expected.double()
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f"{what}: relative error {error:.2g}"


def compared(module, inputs, tolerance):
    """Outputs and gradients with the kernel against the fp64 reference."""
    reference, fused = copy.deepcopy(module).double(), copy.deepcopy(module)
    assert "cpu" in kernels.select(fused, "cpu").values()
    results = []
    generator = torch.Generator().manual_seed(3)
    grad = None
    for layer in (reference, fused):
        dtype = torch.float64 if layer is reference else inputs[0].dtype
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
        y = layer(*leaves) if len(leaves) == 1 else layer.gated(*leaves)
        if grad is None:
            grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            grad = grad.to(inputs[0].dtype).double()
        y.backward(grad.to(y.dtype))
        results.append((y, leaves, dict(layer.named_parameters())))
    (y0, leaves0, parameters0), (y1, leaves1, parameters1) = results
    close(y1, y0.to(y1.dtype), tolerance, "output")
    for n, (a, b) in enumerate(zip(leaves1, leaves0, strict=True)):
        close(a.grad, b.grad.to(a.dtype), tolerance, f"gradient of input {n}")
    for name, parameter in parameters1.items():
        close(parameter.grad, parameters0[name].grad.to(parameter.dtype), tolerance, f"gradient of {name}")


def points(*shape, dtype=torch.float32, seed=0, spread=1.5):
    """Normal points, a tenth of them beyond a grid of [-3, 3]."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order, grid", [(1, 5), (2, 4), (3, 5), (3, 1), (3, 40)])
@pytest.mark.parametrize("rows, inputs, outputs", [(67, 13, 17), (33, 7, 150), (1, 5, 3), (300, 16, 128)])
def test_edge_layer_equals_the_reference(rows, inputs, outputs, order, grid, dtype):
    torch.manual_seed(1)
    layer = KANLinear(inputs, outputs, "bspline", grid_size=grid, order=order).to(dtype)
    compared(layer, [points(rows, inputs, dtype=dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("base", ["silu", None])
@pytest.mark.parametrize("basis", ["linear", "bspline"])
def test_edge_layer_takes_leading_dimensions_and_strides(basis, base):
    torch.manual_seed(1)
    layer = KANLinear(12, 20, basis, base=base)
    compared(layer, [points(4, 12, 9).transpose(1, 2)], TOLERANCE[torch.float32])
    wide = points(3, 5, 24)[..., ::2]
    compared(layer, [wide], TOLERANCE[torch.float32])


@pytest.mark.parametrize("basis", ["linear", "bspline"])
def test_whitened_layer_equals_the_reference(basis):
    torch.manual_seed(1)
    compared(KANLinear(12, 20, basis, conditioning="whitened"), [points(70, 12)], 2e-4)


@pytest.mark.parametrize("kind", ["edge", "learned"])
def test_refined_grid_is_used(kind):
    layer = KANLinear(6, 5, grid_size=4) if kind == "edge" else LearnedFunction(6, 2, grid_size=4)
    kernels.select(layer, "cpu")
    x = points(40, 6)
    with torch.no_grad():
        before = layer(x)
        refine(layer, 8) if kind == "edge" else refine_function(layer, 8)
        close(layer(x), before, 1e-4, "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["silu", None])
@pytest.mark.parametrize(
    "basis, grid, order, channels, groups",
    [
        ("linear", 15, 1, 43 * 8, 8),
        ("bspline", 16, 3, 64, 4),
        ("bspline", 31, 2, 51, 3),
        ("bspline", 50, 3, 40, 1),
        ("bspline", 6, 3, 23, 23),
        ("linear", 7, 1, 35, 7),
        ("rational", 8, 3, 66, 3),
        ("rational", 8, 3, 21, 21),
    ],
)
def test_learned_function_equals_the_reference(basis, grid, order, channels, groups, base, dtype):
    layer = LearnedFunction(channels, groups, basis, grid_size=grid, order=order, base=base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.coefficients += 0.3 * torch.randn(layer.coefficients.shape, generator=generator)
    layer = layer.to(dtype)
    a, u = (points(5, 61, channels, dtype=dtype, seed=s, spread=2.5) for s in (0, 1))
    compared(layer, [a], TOLERANCE[dtype])
    compared(layer, [a, u], TOLERANCE[dtype])
    compared(layer, [a * 0.1, u], TOLERANCE[dtype])  # few cells occur: their sums take another way
    compared(layer, [a.transpose(0, 1), u.transpose(0, 1)], TOLERANCE[dtype])


NORMED = ["gelu", "relu2", "swiglu", "geglu", "kan_act", "kan_grouped", "kan_glu", "kan_product"]


@pytest.mark.parametrize(
    "ffn_type, hidden_norm",
    [(name, False) for name in ("gelu", "swiglu", "kan", "kan_mixed", "kan_grouped", "kan_product")]
    + [(name, True) for name in NORMED],
)
def test_blocks_equal_their_reference(ffn_type, hidden_norm):
    torch.manual_seed(4)
    config = KanLMConfig(
        vocab_size=300, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        ffn_type=ffn_type, kan_grid_size=5, kan_num_groups=4, hidden_norm=hidden_norm,
    )  # fmt: skip
    block = build_ffn(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    compared(block, [points(3, 37, 24, spread=1.0)], 1e-4)


@pytest.mark.parametrize("hidden_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields, width",
    [
        ({"kan_basis": "linear", "kan_order": 1}, 43 * 8),
        ({"kan_order": 2, "kan_num_groups": 3}, 51),
        ({"kan_grid_size": 40, "kan_num_groups": 1}, 40),
        ({"kan_num_groups": 23}, 23),
        ({"kan_basis": "rational", "kan_num_groups": 3}, 66),
    ],
)
def test_a_product_of_two_functions_is_one_call(nan_scratch, fields, width, dtype, hidden_norm):
    config = KanLMConfig(
        hidden_size=24, intermediate_size=width, num_attention_heads=2, ffn_type="kan_product",
        hidden_norm=hidden_norm, **fields,
    )  # fmt: skip
    block = build_ffn(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for function in (block.phi, block.psi):
            function.coefficients += 0.1 * torch.randn(function.coefficients.shape, generator=generator)
        if function.is_spline:
            refine_function(block.psi, 2 * block.psi.basis.grid_size)  # the two may have grids of their own
    block = Gated(block.to(dtype))
    a, u = (points(5, 61, width, dtype=dtype, seed=seed, spread=2.5) for seed in (0, 1))
    compared(block, [a, u], TOLERANCE[dtype])
    kernels.select(block, "cpu")
    calls, learned = [], cpu.learned
    block.block.phi.kernel = block.block.psi.kernel = lambda *arguments: calls.append(learned(*arguments))
    with torch.no_grad():
        close(block.gated(a, u), block.gated(a, u), 1e-9, "output of functions that are kept")
        few = a[:1, :1], u[:1, :1]
        close(block.gated(*few), block.gated(a, u)[:1, :1], TOLERANCE[dtype], "output of one row")
    assert not calls


UNLIKE = {
    "a rational function": {"basis": "rational"},
    "a base": {"base": "silu"},
    "another order": {"order": 2},
    "narrow groups": {"groups": 24},
}


@pytest.mark.parametrize("swapped", ["phi", "psi"])
@pytest.mark.parametrize("unlike", UNLIKE)
def test_a_product_of_unlike_functions_is_computed_too(nan_scratch, unlike, swapped):
    block = build_ffn(
        KanLMConfig(
            hidden_size=16, intermediate_size=24, num_attention_heads=2, ffn_type="kan_product",
            kan_num_groups=3,
        )
    )  # fmt: skip
    function = LearnedFunction(24, **{"groups": 3, "initial": "silu", **UNLIKE[unlike]})
    with torch.no_grad():
        function.coefficients += 0.1 * torch.randn(function.coefficients.shape)
    setattr(block, swapped, function)
    a, u = (points(5, 61, 24, dtype=torch.float32, seed=seed, spread=2.5) for seed in (0, 1))
    compared(Gated(block), [a, u], TOLERANCE[torch.float32])


def test_a_function_put_in_place_later_that_no_kernel_serves_is_refused():
    block = build_ffn(
        KanLMConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, ffn_type="kan_product")
    )
    kernels.select(block, "cpu")
    block.psi = LearnedFunction(24, 8, order=4)
    with pytest.raises(RuntimeError, match="call kernels.select again"):
        block(torch.ones(2, 16))


class Gated(nn.Module):
    """What a product arm computes between its matrices."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        block.gate_proj = block.up_proj = block.down_proj = None

    def gated(self, a, u):
        block = self.block
        if block.kernel is not None:
            return block.kernel(block, a, u)
        return block.phi.gated(block.normalize(a), block.psi(block.normalize(u)))


def test_a_watched_function_is_called_with_normed_values():
    config = KanLMConfig(
        hidden_size=24, intermediate_size=40, num_attention_heads=2, ffn_type="kan_act", hidden_norm=True,
        kan_num_groups=4,
    )  # fmt: skip
    block, x, seen = build_ffn(config), points(5, 24), []
    kernels.select(block, "cpu")
    alone = block(x)
    handle = block.phi.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with pytest.raises(RuntimeError, match="LearnedFunction: got a hook .* call kernels.select again"):
        block(x)
    with kernels.functions_called(block):
        close(block(x), alone, 1e-5, "output")
    close(seen[0].square().mean(-1), torch.ones(5), 1e-3, "mean square")
    kernels.select(block, "cpu")
    close(block(x), alone, 1e-5, "output")
    assert block.kernel is None and len(seen) == 2
    handle.remove()
    kernels.select(block, "cpu")
    assert block.kernel is not None and torch.equal(block(x), alone)


def test_kan_glu_starts_as_swiglu_bit_for_bit():
    config = {"hidden_size": 24, "intermediate_size": 41 * 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    kan_glu = build_ffn(KanLMConfig(**config, ffn_type="kan_glu", kan_glu_form="residual"))
    swiglu = build_ffn(KanLMConfig(**config, ffn_type="swiglu"))
    swiglu.load_state_dict({name: p for name, p in kan_glu.state_dict().items() if "phi" not in name})
    for block in (kan_glu, swiglu):
        assert set(kernels.select(block, "cpu").values()) == {"cpu"}
    x = 20 * points(40, 24)  # gates on and off the grid
    assert torch.equal(kan_glu(x), swiglu(x))
    assert not torch.equal(kan_glu(x), torch.zeros_like(x))


@pytest.mark.parametrize("kind", ["edge", "learned"])
def test_not_a_number_comes_out_as_one(kind):
    layer = KANLinear(6, 5) if kind == "edge" else LearnedFunction(6, 2)
    kernels.select(layer, "cpu")
    x = points(9, 6)
    x[4, 2], x[5, 1], x[6, 0] = float("nan"), float("inf"), float("-inf")
    y = layer(x)
    assert y[4].isnan().any() and y[[0, 1, 2, 3, 7, 8]].isfinite().all()


@pytest.fixture
def nan_scratch(monkeypatch):
    """Every buffer starts as NaN: those that the library allocates, and those that are handed in."""
    real_empty, real_empty_like, real_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real_empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: real_new_empty(*a, **k).fill_(float("nan"))
    )
    native.library().kanlm_poison(1)
    yield
    native.library().kanlm_poison(0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 5, 3), (50, 7, 13), (300, 70, 150)])
def test_uninitialised_scratch_does_not_reach_an_edge_layer(nan_scratch, rows, inputs, outputs, order):
    layer = KANLinear(inputs, outputs, order=order)
    compared(layer, [points(rows, inputs)], TOLERANCE[torch.float32])
    kernels.select(layer.eval(), "cpu")
    with torch.no_grad():
        for few in (points(rows, inputs), points(1, inputs)):
            close(layer(few), layer.reference(few), TOLERANCE[torch.float32], "output without gradients")


@pytest.mark.parametrize("spread", [0.2, 2.5])
@pytest.mark.parametrize(
    "basis, grid, channels, groups",
    [
        ("bspline", 16, 51, 3), ("bspline", 31, 51, 3), ("bspline", 40, 51, 3), ("bspline", 16, 21, 3),
        ("linear", 15, 51, 3), ("rational", 8, 51, 3), ("rational", 8, 21, 3),
    ],
)  # fmt: skip
def test_uninitialised_scratch_does_not_reach_a_learned_function(
    nan_scratch, basis, grid, channels, groups, spread
):
    a, u = (points(70, channels, seed=seed, spread=spread) for seed in (0, 5))
    compared(LearnedFunction(channels, groups, basis, grid_size=grid), [a, u], TOLERANCE[torch.float32])


def test_result_does_not_depend_on_the_number_of_rows_in_a_call():
    layer = KANLinear(9, 40, base=None)  # a matrix product may take another path for one row
    kernels.select(layer, "cpu")
    x = points(75, 9)
    with torch.no_grad():
        assert torch.equal(layer(x)[70:71], layer(x[70:71]))


@pytest.mark.parametrize("form", [{}, {"order": 1}, {"order": 2, "base": None}, {"conditioning": "whitened"}])
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 5, 3), (1, 130, 57), (3, 64, 300), (16, 17, 128)])
def test_edge_layer_without_gradients_equals_the_reference(rows, inputs, outputs, form):
    """A few rows (decoding) take a way of their own."""
    torch.manual_seed(1)
    layer = KANLinear(inputs, outputs, **form).eval()
    exact = copy.deepcopy(layer).double()
    kernels.select(layer, "cpu")
    x = points(2, rows, inputs)
    with torch.no_grad():
        expected = exact(x.double()).float()
        for at in (x[0], x[1:], x, x.expand(40, -1, -1, -1)[:, 0], points(inputs, rows).t()):
            want = exact(at.double()).float()
            close(layer(at), want, 2e-4 if form.get("conditioning") else 3e-5, "output")
        with torch.inference_mode():
            close(layer(x[:1]).clone(), expected[:1], 2e-4, "output in inference mode")


def test_packed_coefficients_follow_the_parameter():
    layer = KANLinear(9, 11).eval()
    kernels.select(layer, "cpu")
    x = points(4, 9)
    with torch.no_grad():
        before = layer(x)
        layer.spline.weight.mul_(2)
        layer.base.weight.mul_(2)
        assert torch.allclose(layer(x), 2 * before, rtol=1e-5)
        layer.load_state_dict({name: 3 * value for name, value in layer.state_dict().items()})
        assert torch.allclose(layer(x), 6 * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["edge", "learned"])
def test_copies_after_decoding_pack_their_own_coefficients(kind):
    layer = (KANLinear(6, 5) if kind == "edge" else LearnedFunction(6, 2)).eval()
    kernels.select(layer, "cpu")
    x = points(4, 6)
    with torch.no_grad():
        before = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), before)
            next(twin.parameters()).mul_(3)
            assert not torch.allclose(twin(x), before)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("basis", ["bspline", "rational"])
def test_tables_of_a_learned_function_follow_the_parameter(basis):
    layer = LearnedFunction(9, 3, basis).eval()
    kernels.select(layer, "cpu")
    x = points(4, 9)
    with torch.no_grad():
        layer(x)
        layer.coefficients += 0.1
        close(layer(x), layer.reference(x, None), 1e-5, "output")


def test_two_runs_are_equal_bit_for_bit():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Sequential(KANLinear(20, 30), LearnedFunction(30, 3))
        kernels.select(layer, "cpu")
        layer(points(600, 20)).square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_gives_the_dtype_that_the_reference_gives():
    layer = KANLinear(6, 5)
    x = points(9, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        kernels.select(layer, "cpu")
        got = layer(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    close(got, expected, TOLERANCE[torch.bfloat16], "output")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_adapter_is_used_or_the_kernel_refuses():
    layer, x = KANLinear(6, 5), points(9, 6)
    kernels.select(layer, "cpu")
    before = layer(x)
    layer.spline.__class__ = layer.base.__class__ = Doubled
    with pytest.raises(RuntimeError, match="spline: .* KANLinear got an adapter.*kernels.select again"):
        layer(x)
    assert kernels.select(layer, "cpu") == {"": "recompute"}
    assert torch.allclose(layer(x), 2 * before, atol=1e-5)


@pytest.mark.parametrize("kind", ["edge", "learned"])
def test_a_cast_after_the_choice_is_refused_and_fp64_recomputes(kind):
    layer = KANLinear(6, 5) if kind == "edge" else LearnedFunction(6, 2)
    kernels.select(layer, "cpu")
    layer.double()
    with pytest.raises(RuntimeError, match="float64.*kernels.select again"):
        layer(points(9, 6).double())
    assert kernels.select(layer, "cpu") == {"": "recompute"}
    assert layer(points(9, 6).double()).dtype == torch.float64
