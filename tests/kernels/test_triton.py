"""The Triton kernels against the reference, on a GPU or, where there is none, in Triton's interpreter.

The interpreter must be chosen before triton is imported, so without a GPU these tests run in a process of
their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
here = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in the interpreter's process")


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the kernels run in this process")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_triton_without_a_gpu_is_an_error():
    if DEVICE == "cuda" or INTERPRETED:
        pytest.skip("triton can run here")
    from kanlm import kernels
    from kanlm.model.kan import KANLinear

    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        kernels.select(KANLinear(4, 3), "triton")


def compared(module, inputs, tolerance):
    """Outputs and gradients with the kernel against the fp64 reference."""
    import copy

    from kanlm import kernels

    module = module.to(DEVICE)
    reference, fused = copy.deepcopy(module).double(), copy.deepcopy(module)
    assert set(kernels.select(fused, "triton").values()) == {"triton"}
    results = []
    for layer, double in ((reference, True), (fused, False)):
        leaves = [
            x.detach().to(DEVICE, torch.float64 if double else x.dtype).requires_grad_() for x in inputs
        ]
        y = layer(*leaves)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y))
        results.append([y.detach(), *(x.grad for x in leaves), *(p.grad for p in layer.parameters())])
    for number, (expected, got) in enumerate(zip(*results, strict=True)):
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"tensor {number} of output, input and parameter gradients: {error:.2g}"


TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def points(*shape, seed=0, dtype=torch.float32):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@here
@DTYPES
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("base", ["silu", None])
def test_edge_layer_equals_the_reference(order, base, dtype):
    from kanlm.model.kan import KANLinear

    torch.manual_seed(0)
    layer = KANLinear(19, 35, "bspline", grid_size=4, order=order, base=base).to(dtype)
    compared(layer, [points(3, 21, 19, dtype=dtype)], TOLERANCE[dtype])


@here
def test_edge_layer_takes_strides_and_whitening():
    from kanlm.model.kan import KANLinear

    torch.manual_seed(0)
    layer = KANLinear(10, 7, "linear", grid_size=5, conditioning="whitened")
    compared(layer, [points(2, 10, 13).transpose(1, 2)], 2e-4)


@here
@DTYPES
@pytest.mark.parametrize(
    "basis, grid, order, base",
    [
        ("bspline", 9, 3, None),
        ("linear", 15, 1, "silu"),
        ("bspline", 17, 2, None),
        ("bspline", 5, 4, "silu"),
        ("bspline", 7, 5, None),
        ("rational", 8, 3, None),
        ("rational", 8, 3, "silu"),
    ],
)
def test_learned_function_equals_the_reference(basis, grid, order, base, dtype):
    from kanlm.model.kan import LearnedFunction

    layer = LearnedFunction(63, 3, basis, grid_size=grid, order=order, base=base)
    with torch.no_grad():
        layer.coefficients += 0.3 * torch.randn(
            layer.coefficients.shape, generator=torch.Generator().manual_seed(1)
        )
    layer = layer.to(dtype)
    a, u = points(70, 63, dtype=dtype), points(70, 63, seed=1, dtype=dtype)
    compared(layer, [a], TOLERANCE[dtype])
    compared(layer, [a, u], TOLERANCE[dtype])


@here
@pytest.mark.parametrize("basis", ["bspline", "rational"])
def test_learned_function_takes_leading_dimensions_and_strides(basis):
    from kanlm.model.kan import LearnedFunction

    a, u = points(3, 21, 13).transpose(1, 2), points(3, 13, 42, seed=1)[..., ::2]
    compared(LearnedFunction(21, 7, basis), [a, u], TOLERANCE[torch.float32])


@here
def test_swiglu_equals_the_reference():
    from kanlm.model.configuration_kanlm import KanLMConfig
    from kanlm.model.ffn import build_ffn

    config = KanLMConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2, ffn_type="swiglu")
    torch.manual_seed(0)
    compared(build_ffn(config), [points(2, 9, 16)], TOLERANCE[torch.float32])


@here
@pytest.mark.parametrize("hidden_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("arm", ["kan_act", "kan_glu", "kan_product"])
def test_blocks_of_learned_functions_equal_the_reference(arm, hidden_norm):
    from kanlm.model.configuration_kanlm import KanLMConfig
    from kanlm.model.ffn import build_ffn

    settings = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "kan_num_groups": 4}
    torch.manual_seed(0)
    block = build_ffn(KanLMConfig(ffn_type=arm, hidden_norm=hidden_norm, **settings))
    compared(block, [points(2, 9, 16)], TOLERANCE[torch.float32])


@here
def test_uninitialised_scratch_does_not_reach_the_result(monkeypatch):
    from kanlm.model.kan import KANLinear, LearnedFunction

    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    compared(KANLinear(5, 6), [points(11, 5)], TOLERANCE[torch.float32])
    for basis in ("bspline", "rational"):
        function = LearnedFunction(10, 2, basis)
        compared(function, [points(11, 10), points(11, 10, seed=2)], TOLERANCE[torch.float32])


@here
def test_two_runs_are_equal_bit_for_bit():
    from kanlm import kernels
    from kanlm.model.kan import KANLinear, LearnedFunction

    results = []
    for _ in range(2):
        torch.manual_seed(0)
        functions = LearnedFunction(12, 3), LearnedFunction(12, 2, "rational")
        layer = torch.nn.Sequential(KANLinear(8, 12), *functions).to(DEVICE)
        kernels.select(layer, "triton")
        layer(points(150, 8).to(DEVICE)).square().sum().backward()
        results.append([p.grad for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@here
@pytest.mark.parametrize("kind", ["edge", "learned"])
def test_compiled_layers_are_one_graph_with_the_kernels_values(kind):
    import copy

    from kanlm import kernels
    from kanlm.model.kan import KANLinear, LearnedFunction

    torch.compiler.reset()
    torch.manual_seed(0)
    layer = (KANLinear(12, 12) if kind == "edge" else LearnedFunction(12, 3)).to(DEVICE)
    kernels.select(layer, "triton", compiled=True)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for function, module in ((layer, layer), (compiled, twin)):
        x = points(40, 12).to(DEVICE).requires_grad_()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or INTERPRETED, reason="needs a CUDA device")
@DTYPES
def test_large_layers_on_a_gpu(dtype):
    from kanlm.model.kan import KANLinear, LearnedFunction

    torch.manual_seed(0)
    compared(
        KANLinear(515, 770, grid_size=8).to(dtype), [points(4099, 515, dtype=dtype)], 10 * TOLERANCE[dtype]
    )
    function = LearnedFunction(2048, 8).to(dtype)
    compared(
        function, [points(4099, 2048, dtype=dtype), points(4099, 2048, seed=1, dtype=dtype)], TOLERANCE[dtype]
    )


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
def test_kernels_compile_for_a_hopper_gpu():
    """Needs no GPU. Products must run on the tensor cores (wgmma), and nothing may spill to memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kanlm.kernels import triton_ops as ops

    wide = {"x_ptr", "dx_ptr", "dw_ptr", "dbase_ptr", "table_ptr", "partial_ptr"}

    def signature(name: str) -> str:
        if name.endswith("_ptr"):
            return "*fp32" if name in wide else "*bf16"
        return "fp32" if name in ("lo", "inv_h") else "i32"

    edge = {"K": 8, "G": 5, "ORDER": 3, "PRECISION": "ieee", "WIDE": False, "BN": 128, "BI": 32, "BO": 128}
    function = {"G": 16, "ORDER": 3, "SILU": False, "GATED": True, "KIND": 0}
    rational = function | {"KIND": 1}
    rows = {"CELLS": 16, "ROWS": 512, "BR": 8, "BC": 32}
    for kernel, constants in (
        (ops.edge_forward_kernel, edge | {"BASE": True}),
        (ops.edge_input_gradient_kernel, edge | {"BASE": True}),
        (ops.edge_coefficient_gradient_kernel, edge),
        (ops.learned_forward_kernel, function | {"BLOCK": 1024}),
        (ops.learned_backward_kernel, function | rows),
        (ops.learned_forward_kernel, rational | {"BLOCK": 1024}),
        (ops.learned_backward_kernel, rational | rows),
    ):
        names = kernel.arg_names
        types = {name: "constexpr" if name in constants else signature(name) for name in names}
        source = ASTSource(kernel, types, constexprs={(names.index(k),): v for k, v in constants.items()})
        options = {"num_warps": 8 if "K" in constants else 4, "num_stages": 3}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ("wgmma" in ptx) == ("K" in constants)
        assert "st.local" not in ptx
