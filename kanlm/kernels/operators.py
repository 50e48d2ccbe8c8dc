"""The fused kernels as operators of torch: a compiler, an exporter and FSDP see one node each.

Each backend has four, `kanlm::BACKEND_elementwise`, `kanlm::BACKEND_edge` and their gradients. An operator
takes tensors and numbers, no modules. Eager calls go past them to autograd functions: an operator's
dispatch takes several times as long (docs/performance.md).

Shapes: ... leading, C channels, N rows, I inputs, O outputs, K basis functions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kanlm.kernels.support import RATIONAL, SPLINE, product_dtype, require_unchanged
from kanlm.model.basis import BSpline
from kanlm.model.kan import KANLinear, LearnedFunction

NO_NORM = (0, 0.0)
NORM_A, NORM_U = 1, 2
"""Which inputs of an elementwise function are RMS-normed over their channels first; `normed` is their sum."""

FUNCTION = "int kind, int channels, int groups, int order, int cells, float low, float high, bool silu"
NORMS = "int normed, float eps"
BASIS = "int order, int cells, float low, float high, ScalarType dtype"
INPUTS, WEIGHTS = "Tensor a, Tensor? u, Tensor? coefficients", "Tensor x, Tensor weight, Tensor? base"
SCHEMAS = {
    "elementwise": f"({INPUTS}, {FUNCTION}, {NORMS}) -> Tensor",
    "elementwise_gradient": (
        f"(Tensor grad, {INPUTS}, {FUNCTION}, {NORMS}, bool wanted) -> (Tensor, Tensor, Tensor)"
    ),
    "edge": f"({WEIGHTS}, {BASIS}) -> Tensor",
    "edge_gradient": (f"(Tensor grad, {WEIGHTS}, {BASIS}, bool[] wanted) -> (Tensor, Tensor, Tensor)"),
}
"""What is not `wanted`, or has nothing it would be the gradient of, comes back as a tensor of no values."""


def function_numbers(layer: LearnedFunction) -> tuple[int, int, int, int, int, float, float, bool]:
    """A learned function as the operators take it, beside its coefficients."""
    silu, basis = layer.base is not None, layer.basis
    if layer.is_rational:
        return RATIONAL, layer.channels, layer.groups, 0, 0, 0.0, 0.0, silu
    grid = basis.order, basis.grid_size, basis.grid_min, basis.grid_max
    return SPLINE, layer.channels, layer.groups, *grid, silu


def activation_numbers(kind: int, channels: int) -> tuple[int, int, int, int, int, float, float, bool]:
    """An activation without coefficients as the operators take it."""
    return kind, channels, 1, 0, 0, 0.0, 0.0, False


def basis_numbers(layer: KANLinear) -> tuple[int, int, float, float]:
    """A full-edge layer's basis as the operators take it."""
    basis = layer.basis
    return basis.order, basis.grid_size, basis.grid_min, basis.grid_max


@cache
def basis_of(order: int, cells: int, low: float, high: float) -> BSpline:
    return BSpline(cells, low, high, order)


def edge(operators: Operators, layer: KANLinear, x: Tensor) -> Tensor:
    """KANLinear as an operator: x [..., I] to [..., O]."""
    require_unchanged(layer)
    weight = layer.spline.weight
    base = None if layer.base is None else layer.base.weight
    flat, dtype = x.reshape(-1, layer.in_features), product_dtype(x, weight)
    y = operators.edge(flat, layer.plain_weight(), base, *basis_numbers(layer), dtype)
    return y.view(*x.shape[:-1], layer.out_features)


class Operators:
    """The operators of one backend, registered under its name.

    Args:
        elementwise: (a, u, coefficients, *function, *norms) -> y [..., C].
        elementwise_gradient: (grad, a, u, coefficients, *function, *norms, wanted) -> the three gradients;
            None for what has none.
        edge: (x, weight, base, *basis, dtype) -> y [N, O] in dtype.
        edge_gradient: (grad, x, weight, base, *basis, dtype, wanted) -> the three gradients, likewise.
    """

    def __init__(
        self,
        backend: str,
        elementwise: Callable[..., Tensor],
        elementwise_gradient: Callable[..., tuple[Tensor | None, ...]],
        edge: Callable[..., Tensor],
        edge_gradient: Callable[..., tuple[Tensor | None, ...]],
    ):
        def define(name: str, function: Callable, fake: Callable) -> Any:
            made = torch.library.custom_op(
                f"kanlm::{backend}_{name}", function, mutates_args=(), schema=SCHEMAS[name]
            )
            made.register_fake(fake)
            return made

        self.elementwise = define("elementwise", elementwise, lambda a, *_: contiguous_like(a))
        self.edge = define(
            "edge", edge, lambda x, weight, *rest: x.new_empty(len(x), len(weight), dtype=rest[-1])
        )
        gradient = define("elementwise_gradient", whole(elementwise_gradient), elementwise_gradient_shapes)
        self.elementwise.register_autograd(
            partial_backward(gradient, wants_coefficients), setup_context=save_inputs
        )
        gradient = define("edge_gradient", whole(edge_gradient), edge_gradient_shapes)
        self.edge.register_autograd(partial_backward(gradient, wants_each), setup_context=save_inputs)


def contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def whole(gradient: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """`gradient` with tensors of no values in place of None, which an operator cannot return."""

    def called(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(grad.new_empty(0) if found is None else found for found in gradient(grad, *rest))

    return called


def elementwise_gradient_shapes(
    grad: Tensor, a: Tensor, u: Tensor | None, coefficients: Tensor | None, *rest: Any
):
    found = (a, u, coefficients if rest[-1] else None)
    return tuple(grad.new_empty(0) if like is None else contiguous_like(like) for like in found)


def edge_gradient_shapes(grad: Tensor, x: Tensor, weight: Tensor, base: Tensor | None, *rest: Any):
    found = (like if wanted else None for like, wanted in zip((x, weight, base), rest[-1], strict=True))
    return tuple(grad.new_empty(0) if like is None else contiguous_like(like) for like in found)


def save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.numbers = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors)


def wants_coefficients(needed: tuple[bool, ...]) -> bool:
    return needed[2]


def wants_each(needed: tuple[bool, ...]) -> list[bool]:
    return list(needed[:3])


def partial_backward(gradient: Any, wanted: Callable[[tuple[bool, ...]], Any]) -> Callable:
    """The backward pass over the operator `gradient`; `wanted` says what it is asked for."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        found = gradient(grad, *ctx.saved_tensors, *ctx.numbers, wanted(needed))
        tensors = (value if need else None for value, need in zip(found, needed[:3], strict=True))
        return (*tensors, *(None for _ in ctx.numbers))

    return backward
