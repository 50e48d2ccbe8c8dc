"""Fused CPU implementations over native.cpp: full-edge layers, learned functions, the MLP arms' activations.

Shapes: N rows (all leading dimensions together), I in, O out, P = O rounded up to whole vectors, C
channels, K basis functions, G grid intervals, k order.

A full-edge layer reads only the k + 1 functions that are not zero at an input, so it does (k + 1) / K of
the dense product's multiply-adds, and its [N, K, I] expansion never exists. Everything is computed in fp32;
only inputs are kept for backward. Each function here takes the module as the first argument: `module.kernel
= edge`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm.kernels import operators
from kanlm.kernels.native import Few, Plan, library, pointer
from kanlm.kernels.operators import (
    NO_NORM,
    NORM_A,
    NORM_U,
    Operators,
    activation_numbers,
    basis_of,
    function_numbers,
)
from kanlm.kernels.support import (
    GELU,
    IDENTITY,
    RATIONAL,
    RELU2,
    SILU,
    SPLINE,
    product_dtype,
    require_plain_function,
    require_unchanged,
)
from kanlm.model.basis import Basis, BSpline
from kanlm.model.ffn import relu2
from kanlm.model.kan import KANLinear, LearnedFunction

VECTOR = 16
FEW = 16
"""Up to so many rows (decoding) a full-edge layer without gradients is one call, its base branch included."""
FUNCTION_ORDER = 3
"""Highest order of the splines of a learned function."""


def _wide(x: Tensor) -> Tensor:
    """x in fp32, contiguous."""
    if not x.is_cpu or x.dtype is torch.float64:
        raise RuntimeError(
            f"the cpu kernel got a {x.dtype} tensor on {x.device}; call kernels.select again after moving or "
            "casting the model"
        )
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def _edge_arguments(
    basis: Basis, rows: int, inputs: int, outputs: int, functions: int | None = None
) -> tuple:
    """What all edge kernels end with: N, I, P, K (or `functions`), order, G, lo, 1 / step, threads."""
    return (
        *(rows, inputs, outputs, functions or basis.num_functions, basis.order, basis.grid_size),
        *(basis.grid_min, 1 / basis.step, torch.get_num_threads()),
    )


def _rounded(outputs: int) -> int:
    return -(-outputs // VECTOR) * VECTOR


def packed_coefficients(weight: Tensor, inputs: int) -> Tensor:
    """spline.weight [O, K * I] as the column tiles that the kernels read, flat fp32 [I * K * P]."""
    weight = _wide(weight)
    outputs, functions = len(weight), weight.shape[1] // inputs
    packed = weight.new_empty(inputs * functions * _rounded(outputs))
    sizes = (outputs, inputs, functions, _rounded(outputs), torch.get_num_threads())
    library().kanlm_edge_pack(pointer(weight), pointer(packed), *sizes)
    return packed


def _edge_output(
    x: Tensor,
    packed: Tensor,
    base: Tensor | None,
    basis: Basis,
    outputs: int,
    functions: int | None = None,
) -> Tensor:
    """y [N, O] fp32 of x [N, I] fp32; `packed` has `functions` rows an input, K unless it is given."""
    rows, inputs = x.shape
    y = x.new_empty(rows, _rounded(outputs))
    if base is None:
        y.zero_()
    elif y.shape[1] == outputs:
        torch.mm(F.silu(x), base.t(), out=y)
    else:
        y[:, :outputs] = F.silu(x) @ base.t()
    arguments = _edge_arguments(basis, rows, inputs, y.shape[1], functions)
    library().kanlm_edge_forward(pointer(x), pointer(packed), pointer(y), *arguments)
    return y if y.shape[1] == outputs else y[:, :outputs].contiguous()


class _Edge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, base, basis):
        packed = packed_coefficients(weight, x.shape[1])
        ctx.save_for_backward(x, packed, weight, base)
        ctx.basis = basis
        wide_base = None if base is None else base.float()
        return _edge_output(_wide(x), packed, wide_base, basis, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, packed, weight, base = ctx.saved_tensors
        found = _edge_gradients(grad, x, packed, weight, base, ctx.basis, ctx.needs_input_grad[:3])
        return *found, None


def _edge_gradients(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    weight: Tensor,
    base: Tensor | None,
    basis: Basis,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by x [N, I], weight [O, K * I] and base [O, I], where they are wanted; grad [N, O]."""
    wants_x, wants_weight, wants_base = wanted
    wide, outputs = _wide(x), len(weight)
    rows, inputs = wide.shape
    padded = _rounded(outputs)
    grad = _wide(grad)
    columns = grad if padded == outputs else F.pad(grad, (0, padded - outputs))  # [N, P]
    arguments = _edge_arguments(basis, rows, inputs, padded)
    native = library()
    grad_x = grad_weight = grad_base = None
    if wants_x:
        grad_x = torch.empty_like(wide)
        native.kanlm_edge_input_gradient(
            pointer(wide), pointer(packed), pointer(columns), pointer(grad_x), *arguments
        )
        if base is not None:
            grad_x += torch.ops.aten.silu_backward(grad @ base.float(), wide)
        grad_x = grad_x.to(x.dtype)
    if wants_weight:
        totals = torch.empty_like(packed)
        transposed = wide.t().contiguous()
        native.kanlm_edge_coefficient_gradient(
            pointer(transposed), pointer(columns), pointer(totals), *arguments
        )
        grad_weight = torch.empty(weight.shape, dtype=torch.float32)
        sizes = (outputs, inputs, basis.num_functions, padded, torch.get_num_threads())
        native.kanlm_edge_unpack(pointer(grad_weight), pointer(totals), *sizes)
        grad_weight = grad_weight.to(weight.dtype)
    if wants_base and base is not None:
        grad_base = (grad.t() @ F.silu(wide)).to(base.dtype)
    return grad_x, grad_weight, grad_base


def edge(layer: KANLinear, x: Tensor) -> Tensor:
    """KANLinear: x [..., I] to [..., O]."""
    if torch.compiler.is_compiling():
        return operators.edge(OPERATORS, layer, x)
    require_unchanged(layer)
    spline: Any = layer._modules["spline"]
    base_layer: Any = layer._modules.get("base")
    weight = spline._parameters["weight"]
    if (
        weight.dtype is x.dtype is torch.float32
        and x.is_cpu
        and not (torch.is_grad_enabled() or layer.training or torch.is_autocast_enabled("cpu"))
        and x.numel() <= FEW * layer.in_features
    ):
        return _few_rows(layer, x)
    dtype = product_dtype(x, weight)
    base = None if base_layer is None else base_layer.weight
    flat = x.reshape(-1, layer.in_features)
    exact = torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    with exact:
        if torch.is_grad_enabled():
            layer.__dict__.pop("_packed", None)
            y = _Edge.apply(flat, layer.plain_weight(), base, layer.basis)
        else:
            base = None if base is None else base.float()
            _, few, packed = _cached_layer(layer)
            y = _edge_output(_wide(flat), packed, base, layer.basis, layer.out_features, few.K)
    return y.to(dtype).view(*x.shape[:-1], layer.out_features)


def _few_rows(layer: KANLinear, x: Tensor) -> Tensor:
    """`edge` for a few rows in fp32 without gradients."""
    address, *_ = _cached_layer(layer)
    x = x.contiguous()
    shape = x.shape[:-1]
    y = x.new_empty((*shape, layer.out_features))
    library().kanlm_edge_few(address, x.data_ptr(), y.data_ptr(), shape.numel(), torch.get_num_threads())
    return y


def _cached_layer(layer: KANLinear) -> tuple[int, Few, Tensor]:
    spline: Any = layer._modules["spline"]
    base: Any = layer._modules.get("base")
    sources = [spline._parameters["weight"]]
    if base is not None:
        sources.append(base._parameters["weight"])
    if (whitening := layer._buffers["whitening"]) is not None:
        sources.append(whitening)
    return cache_on(layer, sources, _packed_layer)


def _packed_layer(layer: KANLinear) -> tuple[int, Few, Tensor]:
    """Address of what `kanlm_edge_few` reads of the layer, and what must live as long."""
    weight, basis = layer.plain_weight(), layer.basis
    if layer.base is not None:
        weight = torch.cat((weight, layer.base.weight), dim=1)  # one function more
    functions = weight.shape[1] // layer.in_features
    packed = packed_coefficients(weight, layer.in_features)
    few = Few(
        *(packed.data_ptr(), layer.in_features, layer.out_features, functions),
        *(basis.order, basis.grid_size, layer.base is not None, basis.grid_min, 1 / basis.step),
    )
    return ctypes.addressof(few), few, packed


class Cached:
    """A value and what it was made from. A copy of the layer, or one read from a file, makes its own."""

    def __init__(self, mark: list | None = None, value: tuple = ()):
        self.mark, self.value = mark, value

    def __reduce__(self):
        return Cached, ()


def cache_on(layer: nn.Module, sources: list[Tensor], made: Callable[[Any], tuple]) -> tuple:
    """`made(layer)`, kept between calls without gradients as long as `sources` do not change.

    It is made again when a source is another tensor or was written in place. A write through `.data` moves no
    version counter: call the layer once with gradients enabled, or `kernels.select` again, after one.
    """
    mark: list[Any] = []
    for tensor in sources:
        if tensor.is_inference():  # without a version counter
            return made(layer)
        mark.append((id(tensor), tensor.data_ptr(), tensor._version))
    if layer.training:
        return made(layer)
    found = layer.__dict__.get("_packed")
    if found is None or found.mark != mark:
        found = layer.__dict__["_packed"] = Cached(mark, made(layer))
    return found.value


@cache
def _plan(
    kind: int,
    channels: int,
    groups: int = 1,
    basis: Basis | None = None,
    silu: bool = False,
    normed: int = 0,
    eps: float = 0.0,
) -> Plan:
    """What the elementwise kernels need to know of a function beside its coefficients.

    Raises:
        RuntimeError: a function that they are not written for, put in place after `kernels.select`.
    """
    order, cells, low, inverse = (0, 0, 0.0, 0.0)
    if basis is not None:
        if not (isinstance(basis, BSpline) and 1 <= basis.order <= FUNCTION_ORDER):
            raise RuntimeError(
                f"the cpu kernel got a function of {basis}, which it does not know; call kernels.select again"
            )
        order, cells, low, inverse = basis.order, basis.grid_size, basis.grid_min, 1 / basis.step
    return Plan(channels, groups, kind, order, cells, low, inverse, int(silu), normed, eps)


def _address(plan: Plan | None) -> int | None:
    return None if plan is None else ctypes.addressof(plan)


def _wide_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _wide(x)


def evaluate(
    phi: Plan,
    psi: Plan | None,
    of_phi: Tensor | None,
    of_psi: Tensor | None,
    a: Tensor,
    u: Tensor | None,
) -> Tensor:
    """phi(a) * u, or phi(a) * psi(u), [..., C] in the dtype of a; the coefficients are [groups, K]."""
    wide = _wide(a)
    inputs = _wide_or_none(of_phi), _wide_or_none(of_psi), wide, _wide_or_none(u)
    y = torch.empty_like(wide)
    library().kanlm_elementwise(
        *(_address(phi), _address(psi), *(pointer(tensor) for tensor in inputs), y.data_ptr()),
        *(a.numel() // phi.C, torch.get_num_threads()),
    )
    return y if a.dtype is torch.float32 else y.to(a.dtype)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, phi, psi, of_phi, of_psi, a, u):
        ctx.save_for_backward(of_phi, of_psi, a, u)
        ctx.plans = phi, psi
        return evaluate(phi, psi, of_phi, of_psi, a, u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, *_gradients(*ctx.plans, *ctx.saved_tensors, grad, ctx.needs_input_grad[2:4])


def _gradients(
    phi: Plan,
    psi: Plan | None,
    of_phi: Tensor | None,
    of_psi: Tensor | None,
    a: Tensor,
    u: Tensor | None,
    grad: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients by the coefficients, which are `wanted`, and by a and u; None for what there is not."""
    tensors = of_phi, of_psi, a, u
    inputs = [_wide_or_none(tensor) for tensor in tensors]
    wide_grad = _wide(grad)
    found = [
        torch.empty_like(tensor) if want and tensor is not None else None
        for tensor, want in zip(inputs, (*wanted, True, True), strict=True)
    ]
    of_coefficients, of_inputs = found[:2], found[2:]
    library().kanlm_elementwise_gradient(
        *(_address(phi), _address(psi), *(pointer(tensor) for tensor in (*inputs, wide_grad))),
        *(pointer(tensor) for tensor in (*of_inputs, *of_coefficients)),
        *(grad.numel() // phi.C, torch.get_num_threads()),
    )
    return [
        gradient if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(found, tensors, strict=True)
    ]


def learned(layer: LearnedFunction, a: Tensor, u: Tensor | None, normed: int = 0, eps: float = 0.0) -> Tensor:
    """LearnedFunction: phi(a) * u, or phi(a) where u is None; [..., C]; normed inputs are normed first."""
    if torch.compiler.is_compiling():
        return OPERATORS.elementwise(a, u, layer.coefficients, *function_numbers(layer), normed, eps)
    return _apply(_plan_of(layer, normed, eps), None, layer._parameters["coefficients"], None, a, u)


def _apply(*plans_and_tensors: Any) -> Tensor:
    """`evaluate`, within autograd where it is on."""
    return (_Elementwise.apply if torch.is_grad_enabled() else evaluate)(*plans_and_tensors)


def _plan_of(layer: LearnedFunction, normed: int, eps: float) -> Plan:
    kind, basis = (RATIONAL, None) if layer.is_rational else (SPLINE, layer.basis)
    return _plan(kind, layer.channels, layer.groups, basis, layer.base is not None, normed, eps)


def apply_normed(function: LearnedFunction, a: Tensor, u: Tensor | None, eps: float) -> Tensor:
    """function(norm(a)), or that times norm(u): what an arm with `hidden_norm` computes."""
    require_plain_function(function)
    return learned(function, a, u, NORM_A if u is None else NORM_A | NORM_U, eps)


def learned_product(block: Any, a: Tensor, u: Tensor) -> Tensor:
    """block.phi(a) * block.psi(u), of a block with `hidden_norm` of norm(a) and norm(u); [..., C]."""
    phi, psi = block.phi, block.psi
    normed = block.hidden_norm
    eps = block.norm_eps if normed else 0.0
    if not torch.compiler.is_compiling():
        require_plain_function(phi)
        require_plain_function(psi)
        plans = _plan_of(phi, NORM_A | NORM_U if normed else 0, eps), _plan_of(psi, 0, 0.0)
        if _in_one_sweep(*plans):
            return _apply(*plans, phi._parameters["coefficients"], psi._parameters["coefficients"], a, u)
    factor = learned(psi, u, None, NORM_A if normed else 0, eps)
    return learned(phi, a, factor, NORM_A if normed else 0, eps)


def _in_one_sweep(phi: Plan, psi: Plan) -> bool:
    """Whether the kernel serves their product: it is written for two functions of one form without a base."""
    form, other = ((plan.kind, plan.order, plan.C, plan.groups) for plan in (phi, psi))
    return form == other and not (phi.silu or psi.silu)


def norm(x: Tensor, eps: float) -> Tensor:
    """x [..., C], RMS-normed over its channels."""
    return _fixed(IDENTITY, x, None, NORM_A, eps)


def activation(function: Callable) -> Callable | None:
    """The kernel (module, a, u or None) -> function(a) * u of an MLP's activation, or None."""
    if isinstance(function, nn.GELU):
        kind = GELU if function.approximate == "none" else None
    else:
        kind = {F.silu: SILU, F.gelu: GELU, relu2: RELU2}.get(function)
    return None if kind is None else partial(_activated, kind)


def _activated(kind: int, module: Any, a: Tensor, u: Tensor | None) -> Tensor:
    if not module.hidden_norm:
        return _fixed(kind, a, u, *NO_NORM)
    return _fixed(kind, a, u, NORM_A if u is None else NORM_A | NORM_U, module.norm_eps)


def _fixed(kind: int, a: Tensor, u: Tensor | None, normed: int, eps: float) -> Tensor:
    """f(a) * u of a function without coefficients."""
    channels = a.shape[-1]
    if torch.compiler.is_compiling():
        return OPERATORS.elementwise(a, u, None, *activation_numbers(kind, channels), normed, eps)
    return _apply(_plan(kind, channels, normed=normed, eps=eps), None, None, None, a, u)


def _plan_from(kind, channels, groups, order, cells, low, high, silu, normed, eps) -> Plan:
    """Of an operator's numbers."""
    basis = basis_of(order, cells, low, high) if kind == SPLINE else None
    return _plan(kind, channels, groups, basis, silu, normed, eps)


def _elementwise_operator(a: Tensor, u: Tensor | None, coefficients: Tensor | None, *numbers) -> Tensor:
    return evaluate(_plan_from(*numbers), None, coefficients, None, a, u)


def _elementwise_gradient_operator(grad, a, u, coefficients, *numbers):
    *numbers, wanted = numbers
    found = _gradients(_plan_from(*numbers), None, coefficients, None, a, u, grad, (wanted, False))
    return found[2], found[3], found[0]


def _edge_operator(x, weight, base, order, cells, low, high, dtype) -> Tensor:
    packed, basis = packed_coefficients(weight, x.shape[1]), basis_of(order, cells, low, high)
    y = _edge_output(_wide(x), packed, None if base is None else base.float(), basis, len(weight))
    return y.to(dtype)


def _edge_gradient_operator(grad, x, weight, base, order, cells, low, high, dtype, wanted):
    packed = packed_coefficients(weight, x.shape[1])
    return _edge_gradients(grad, x, packed, weight, base, basis_of(order, cells, low, high), wanted)


OPERATORS = Operators(
    "cpu", _elementwise_operator, _elementwise_gradient_operator, _edge_operator, _edge_gradient_operator
)
