"""The kernels as operators: one graph for a compiler, the values of eager calls, and torch's own checks."""

import copy

import pytest
import torch
import torch._dynamo

from kanlm import kernels
from kanlm.kernels import cpu, native
from kanlm.kernels.operators import activation_numbers, basis_numbers, function_numbers
from kanlm.kernels.support import SILU
from kanlm.model.configuration_kanlm import KanLMConfig
from kanlm.model.ffn import build_ffn
from kanlm.model.kan import KANLinear, LearnedFunction

try:
    native.library()
except native.NativeUnavailable as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

ARMS = "gelu", "relu2", "swiglu", "kan", "kan_mixed", "kan_act", "kan_grouped", "kan_glu", "kan_product"


def block_of(ffn_type, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "kan_num_groups": 4}
    block = build_ffn(KanLMConfig(ffn_type=ffn_type, kan_grid_size=5, **sizes, **fields))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return block


def points(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function, block, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.parametrize("hidden_norm", [False, True])
@pytest.mark.parametrize("ffn_type", ARMS)
def test_a_compiled_block_is_one_graph_with_the_kernels_values(ffn_type, hidden_norm):
    torch.compiler.reset()
    block = block_of(ffn_type, hidden_norm=hidden_norm)
    assert "cpu" in kernels.select(block, "cpu", compiled=True).values()
    twin = copy.deepcopy(block)
    seen = []

    def backend(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    x = points(3, 7, 16)
    for got, expected in zip(results(compiled, twin, x), results(block, block, x), strict=True):
        assert torch.equal(got, expected)
    assert len(seen) == 1 and any("kanlm" in target for target in seen[0])
    assert not any("rms_norm" in target for target in seen[0])


@pytest.mark.parametrize("ffn_type", ["swiglu", "kan_mixed", "kan_product"])
def test_a_compiled_backward_pass_has_the_kernels_values(ffn_type):
    torch.compiler.reset()
    block = block_of(ffn_type, hidden_norm=True)
    kernels.select(block, "cpu", compiled=True)
    twin = copy.deepcopy(block)
    x = points(3, 7, 16)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled, twin, x), results(block, block, x), strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


CHECKS = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["bspline", "rational"])
def test_torch_checks_the_elementwise_operator(basis, dtype):
    layer = LearnedFunction(12, 3, basis).to(dtype)
    a, u = (points(5, 12, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    for second, normed in ((u, 3), (None, 1)):
        arguments = (a, second, layer.coefficients, *function_numbers(layer), normed, 1e-6)
        torch.library.opcheck(cpu.OPERATORS.elementwise, arguments, test_utils=CHECKS)


def test_torch_checks_an_activations_operator():
    a = points(5, 12).requires_grad_()
    torch.library.opcheck(
        cpu.OPERATORS.elementwise, (a, None, None, *activation_numbers(SILU, 12), 0, 0.0), test_utils=CHECKS
    )


@pytest.mark.parametrize("base", ["silu", None])
def test_torch_checks_the_edge_operator(base):
    layer = KANLinear(6, 5, base=base)
    x, weight = points(7, 6).requires_grad_(), None if layer.base is None else layer.base.weight
    arguments = (x, layer.spline.weight, weight, *basis_numbers(layer), torch.float32)
    torch.library.opcheck(cpu.OPERATORS.edge, arguments, test_utils=CHECKS)


def test_an_exported_program_calls_the_operator():
    block = block_of("kan_glu").eval()
    kernels.select(block, "cpu")
    x = points(2, 3, 16)
    program = torch.export.export(block, (x,))
    assert any("kanlm" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), block(x))
