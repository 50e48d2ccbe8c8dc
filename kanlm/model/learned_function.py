# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""A learned function per channel or group of channels, and its product with a second input.

Shapes: ... leading, C channels, K coefficients, G grid intervals, k order.

Reference: Yang & Wang 2024, arXiv:2409.10594 (functions shared by groups of channels).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import BASES, BSpline, at_least_fp32, exact_product, make_basis, uniform_pieces

INITIAL_FUNCTIONS = {
    "zero": torch.zeros_like,
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
}

RATIONAL_INITIAL = {
    "silu": (
        (3.4949337e-06, 0.5, 0.24998142, 0.053008988, 0.0056863941, 0.000260205),
        (0.26493473, -0.013261471, 0.18928171, 0.01856188),
    ),
    "gelu": (
        (-0.0023883712, 0.5, 0.41356217, 0.11339915, 0.010300634, 0.0),
        (0.40959986, 0.0, 0.24295322, 0.0),
    ),
}
"""Numerator and denominator of the least-squares fits on [-4, 4]; maximal errors 1.2e-5 and 2.4e-3."""


class LearnedFunction(nn.Module):
    """phi_g(x) on every channel of group g: x [..., C] to [..., C]; `gated(a, u)` is phi(a) * u.

    Channels are split in `groups` runs of neighbours. phi_g(x) = b(x) + sum_m c_gm B_m(x), the coefficients
    c in the parameter `coefficients` [groups, K]. `basis="rational"` is phi_g(x) = P(x) / Q(x), K = 10
    coefficients p_0..p_5, q_0..q_3: P(x) = sum_n p_n x^n and Q(x) = 1 + (q_0 x + q_1 x^2)^2 + (q_2 x + q_3
    x^2)^2. Q is positive everywhere; its gradient vanishes only at q = 0, where this layer never starts.

    At an infinite x a B-spline is NaN or infinite, never finite.

    Args:
        groups: default: one function per channel.
        basis, grid_size, order, grid_min, grid_max: see `basis.make_basis`; the grid is also where
            `initial` is fitted.
        base: "silu" or None, a fixed function b added to the learned one.
        initial: "silu", "gelu", "identity" or "zero": what sum_m c_gm B_m is at the start.

    Raises:
        ValueError: groups that do not divide channels, unknown names, inputs whose last dimension is not C.
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
        if base not in ("silu", None):
            raise ValueError(f"base: unknown function {base!r}; choose 'silu' or None")
        if initial not in INITIAL_FUNCTIONS:
            raise ValueError(
                f"initial: unknown function {initial!r}; choose one of {', '.join(INITIAL_FUNCTIONS)}"
            )
        self.channels, self.groups = channels, groups
        self.basis_name, self.base, self.initial = basis, base, initial
        self.is_rational = basis == "rational"
        if basis not in BASES and not self.is_rational:
            raise ValueError(f"basis: unknown name {basis!r}; choose one of {', '.join(BASES)}, rational")
        if self.is_rational and initial == "zero":
            raise ValueError(
                "initial: a rational function cannot start at 'zero' and train; choose 'identity'"
            )
        self.basis = make_basis(
            "bspline" if self.is_rational else basis, grid_size, order, grid_min, grid_max
        )
        self.kernel = None
        self.coefficients = nn.Parameter(torch.empty(groups, self.num_functions, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def num_functions(self) -> int:
        return 10 if self.is_rational else self.basis.num_functions

    @property
    def is_spline(self) -> bool:
        """Whether phi is evaluated from `table`."""
        return isinstance(self.basis, BSpline) and not self.is_rational

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, {self.basis_name}, base={self.base}, {self.basis}"

    @torch.no_grad()
    def reset_parameters(self):
        """Initial values; weights that transformers has loaded are left alone."""
        init.copy_(self.coefficients, self.initial_coefficients().expand(self.groups, -1))

    def initial_coefficients(self) -> Tensor:
        """The coefficients [K] of `initial`, fp64 on the CPU: least squares on the grid."""
        if self.is_rational:
            if self.initial in RATIONAL_INITIAL:
                numerator, denominator = RATIONAL_INITIAL[self.initial]
            else:  # x = x Q(x) / Q(x), with the Q of SiLU
                denominator = RATIONAL_INITIAL["silu"][1]
                q0, q1, q2, q3 = denominator
                numerator = (0.0, 1.0, 0.0, q0**2 + q2**2, 2 * (q0 * q1 + q2 * q3), q1**2 + q3**2)
            return torch.tensor(numerator + denominator, dtype=torch.float64, device="cpu")
        basis = self.basis
        count = 40 * basis.num_functions + 1
        points = torch.linspace(basis.grid_min, basis.grid_max, count, dtype=torch.float64, device="cpu")
        values = basis.values(points.unsqueeze(-1)).squeeze(-1)  # [points, K]
        target = INITIAL_FUNCTIONS[self.initial](points)
        return torch.linalg.lstsq(values, target.unsqueeze(-1)).solution.squeeze(-1)

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
        if self.is_spline:
            phi = self._spline(x)
        elif self.is_rational:
            phi = self._rational(x, self._per_channel())
        else:
            phi = (self.basis.values(x) * self._per_channel()).sum(-2)
        if self.base is not None:
            phi = phi + F.silu(x)
        phi = phi.to(a.dtype)
        return phi if u is None else phi * u

    def _per_channel(self) -> Tensor:
        """The coefficients as [K, C]."""
        return at_least_fp32(self.coefficients).t().repeat_interleave(self.channels // self.groups, dim=-1)

    @staticmethod
    def _rational(x: Tensor, c: Tensor) -> Tensor:
        """P/Q at x [..., C] for coefficients c [10, C]."""
        numerator = c[5]
        for n in range(4, -1, -1):
            numerator = numerator * x + c[n]
        return numerator / (1 + ((c[6] + c[7] * x) * x).square() + ((c[8] + c[9] * x) * x).square())

    def _spline(self, x: Tensor) -> Tensor:
        """sum_m c_m B_m(x) by the polynomial of each x's interval: a gather, not K basis functions."""
        intervals = self.basis.grid_size
        position = (x - self.basis.grid_min) * (1 / self.basis.step)
        index = position.detach().floor().clamp(-1, intervals)
        u = position - index.clamp(min=0)
        group = torch.arange(self.groups, device=x.device).repeat_interleave(self.channels // self.groups)
        # A NaN has no interval; it must come out as NaN, not as an index outside the memory.
        rows = (index.long() + 1).clamp(0, intervals + 1) + group * (intervals + 2)
        # Gathered power by power: the gradient of gathering whole rows takes three times as long.
        powers = self.table().flatten(0, 1).t().contiguous()  # [k+1, groups * (G + 2)]
        gathered = [power.index_select(0, rows.flatten()).view_as(x) for power in powers]
        value = gathered[-1]
        for coefficient in gathered[-2::-1]:
            value = torch.addcmul(coefficient, value, u)
        return value

    def table(self) -> Tensor:
        """Polynomials of B-spline functions, [groups, G + 2, k + 1], fp32 or fp64, differentiable.

        Entry [g, j, p] is the coefficient of u^p on interval j - 1, u = (x - left edge) / step; rows 0 and
        G + 1 are the linear continuations outside the grid, with u measured from the grid's edge.
        """
        c = at_least_fp32(self.coefficients)
        pieces = torch.tensor(uniform_pieces(self.basis.order), dtype=c.dtype, device=c.device)
        pieces = F.pad(pieces, (0, 2 - min(2, len(pieces))))  # a slope, 0, also at order 0
        inner = exact_product(c.unfold(-1, len(pieces), 1), pieces)  # [groups, G, powers]
        powers = torch.arange(inner.shape[-1], device=c.device)
        left, last = inner[:, :1] * (powers < 2), inner[:, -1:]
        right = torch.stack((last.sum(-1), (last * powers).sum(-1)), dim=-1)  # value and slope at u = 1
        return torch.cat((left, inner, F.pad(right, (0, len(powers) - 2))), dim=1)
