# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""A learned function per channel or group of channels, and its product with a second input.

Shapes: ... leading, C channels, K coefficients, G grid intervals, k order.

Reference: Yang & Wang 2024, arXiv:2409.10594 (functions shared by groups of channels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import INITIAL_FUNCTIONS, BSpline, Rational, at_least_fp32, check_choice, make_basis

SILU_FLOPS = 4
"""Forward FLOPs of SiLU at one input."""


class LearnedFunction(nn.Module):
    """phi_g(x) on every channel of group g: x [..., C] to [..., C]; `gated(a, u)` is phi(a) * u.

    Channels are split in `groups` runs of neighbours. phi_g(x) = b(x) + sum_m c_gm B_m(x), the coefficients
    c in the parameter `coefficients` [groups, K]. With `basis="rational"` the sum is replaced by P(x) / Q(x),
    see `basis.Rational`; K is 10.

    At an infinite x a B-spline is NaN or infinite, never finite.

    Args:
        groups: default: one function per channel.
        basis, grid_size, order, grid_min, grid_max: see `basis.make_basis`; the grid is also where
            `initial` is fitted.
        base: "silu" or None, a fixed function b added to the learned one.
        initial: one of `basis.INITIAL_FUNCTIONS`, what the learned part is at the start.

    Raises:
        ValueError: groups that do not divide channels, unknown names, a rational function from zero or
            `gelu_wave`, inputs whose last dimension is not C.
    """

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        basis: str = "bspline",
        *,
        grid_size: int = 16,
        order: int = 3,
        grid_min: float = -4.0,
        grid_max: float = 4.0,
        base: str | None = None,
        initial: str = "silu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        groups = channels if groups is None else groups
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups} does not divide channels {channels}; choose a divisor")
        check_choice("base", base, ("silu", None))
        check_choice("initial", initial, INITIAL_FUNCTIONS)
        self.channels, self.groups = channels, groups
        self.base, self.initial = base, initial
        self.basis = make_basis(basis, grid_size, order, grid_min, grid_max)
        self.kernel = None  # only kernels.select of the package kanlm sets it
        self.coefficients = nn.Parameter(torch.empty(groups, self.num_functions, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_functions(self) -> int:
        """K, coefficients of a function."""
        return self.basis.num_functions

    @property
    def flops(self) -> int:
        """Forward FLOPs at one input."""
        return self.basis.combine_flops + (1 + SILU_FLOPS if self.base is not None else 0)

    @property
    def is_rational(self) -> bool:
        return isinstance(self.basis, Rational)

    @property
    def is_spline(self) -> bool:
        """Whether phi is a polynomial on each interval, those of `table`."""
        return isinstance(self.basis, BSpline)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, {self.basis}, base={self.base}"

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values; weights that transformers has loaded are left alone."""
        start = self.basis.initial_coefficients(self.initial)
        init.copy_(self.coefficients, start.expand(self.groups, -1))

    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        """phi(a) * u: [..., C] and [..., C] to [..., C]. A call, so that hooks (offloading, FSDP) see it."""
        return self(a, u)

    def forward(self, a: Tensor, u: Tensor | None = None) -> Tensor:
        """phi(a), or phi(a) * u: [..., C] to [..., C] in the dtype of a."""
        if a.shape[-1] != self.channels:
            raise ValueError(
                f"x: the last dimension must be channels {self.channels}, got shape {tuple(a.shape)}; "
                "pass x [..., channels] or build the function for it"
            )
        if u is not None and u.shape != a.shape:
            raise ValueError(f"u: must have the shape of a {tuple(a.shape)}, got {tuple(u.shape)}")
        if self.kernel is not None:
            return self.kernel(self, a, u)
        return self.reference(a, u)

    def reference(self, a: Tensor, u: Tensor | None) -> Tensor:
        """phi(a) * u, or phi(a) where u is None: the definition, which every kernel is tested against."""
        x = at_least_fp32(a)
        phi = self.basis.combine(self.coefficients, x)
        if self.base is not None:
            phi = phi + F.silu(x)
        phi = phi.to(a.dtype)
        return phi if u is None else phi * u

    def table(self) -> Tensor:
        """Polynomials of spline functions, [groups, G + 2, k + 1]; see `BSpline.table`."""
        assert isinstance(self.basis, BSpline)
        return self.basis.table(self.coefficients)
