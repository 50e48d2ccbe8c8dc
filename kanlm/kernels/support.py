"""Which layers the fused kernels serve, and the numbers that all of them share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kanlm.model.basis import BSpline
from kanlm.model.kan import KANLinear, LearnedFunction

SPLINE, RATIONAL, SILU, GELU, RELU2, IDENTITY = range(6)
"""Kinds of functions: `enum Kind` of native.cpp, and KIND of the Triton kernels."""

EDGE_ORDERS = range(1, 4)
"""Orders of B-splines of a full-edge layer that the fused kernels are written for."""


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a call of `layer` is the product with its weight and no more.

    It is more with an adapter (LoRA), a quantised weight, any hook, or weights that are offloaded. Weights
    that FSDP2 has sharded count: they are whole within the forward pass of the block that holds them.
    """
    if type(layer) is not nn.Linear or type(layer._parameters.get("weight")).__name__ not in PLAIN_WEIGHTS:
        return False
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return "forward" not in vars(layer) and not any(hooks)


PLAIN_WEIGHTS = ("Parameter", "DTensor")


def supports_edge(layer: KANLinear) -> bool:
    """Whether fused kernels implement this layer as it is now."""
    children = [child for child in (layer.spline, layer.base) if child is not None]
    return (
        type(layer.basis) is BSpline
        and layer.basis.order in EDGE_ORDERS
        and all(is_plain_linear(child) and child.weight.dtype != torch.float64 for child in children)
    )


def supports_learned(layer: LearnedFunction, highest_order: int) -> bool:
    """Whether kernels for splines of order 1 to `highest_order` implement this function."""
    if layer.coefficients.dtype == torch.float64:
        return False
    return layer.is_rational or (layer.is_spline and 1 <= layer.basis.order <= highest_order)


def require_unchanged(layer: KANLinear) -> None:
    """A kernel reads the weights of the layer's children, so what replaced or wrapped a child must be told.

    Raises:
        RuntimeError: a child that is no longer a plain linear layer.
    """
    # In decoding, every look-up of an attribute by nn.Module counts: these go to its dictionaries.
    for name, child in layer._modules.items():
        if child is not None and not is_plain_linear(child):
            raise RuntimeError(
                f"{name}: this child of a {type(layer).__name__} got an adapter, a hook or another weight "
                "after kernels.select; call kernels.select again"
            )


def is_plain_function(function: nn.Module) -> bool:
    """Whether a call of `function` is that of a LearnedFunction and no more: no hook, no other forward."""
    hooks = (
        function._forward_hooks,
        function._forward_pre_hooks,
        function._backward_hooks,
        function._backward_pre_hooks,
    )
    return type(function) is LearnedFunction and "forward" not in function.__dict__ and not any(hooks)


def require_plain_function(function: nn.Module) -> None:
    """A kernel that norms a function's input does not call the function.

    Raises:
        RuntimeError: a function that got a hook or was replaced, which the kernel would pass by.
    """
    if not is_plain_function(function):
        raise RuntimeError(
            f"{type(function).__name__}: got a hook or another forward method after kernels.select; call "
            "kernels.select again, or work within kernels.functions_called(model)"
        )


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x and weight here: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
