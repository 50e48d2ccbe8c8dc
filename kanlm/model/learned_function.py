# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""A learned function per channel or group of channels, and its product with a second input.

Shapes: ... leading, N rows, C channels, K coefficients, G grid intervals, k order.

Reference: Yang & Wang 2024, arXiv:2409.10594 (functions shared by groups of channels).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .basis import BASES, BSpline, at_least_fp32, make_basis, row_chunks, slope_of, uniform_pieces
from .refit import check_finer, even_points, refit_map

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


class _Gated(torch.autograd.Function):
    """phi(a) * u, or phi(a) without u; saves a and u and evaluates phi again in backward."""

    @staticmethod
    def forward(ctx, a, u, coefficients, layer):
        ctx.save_for_backward(a, u, coefficients)
        ctx.layer = layer
        phi = layer._value(a, coefficients)
        return phi if u is None else phi * u

    @staticmethod
    def backward(ctx, grad):
        a, u, coefficients = ctx.saved_tensors
        value, slope = ctx.layer._value_and_slope(a, coefficients)
        grad_u = grad * value.to(grad.dtype) if u is not None and ctx.needs_input_grad[1] else None
        grad_phi = at_least_fp32(grad) if u is None else at_least_fp32(grad) * u
        grad_a = (grad_phi * slope).to(a.dtype) if ctx.needs_input_grad[0] else None
        grad_c = None
        if ctx.needs_input_grad[2]:
            grad_c = ctx.layer._coefficient_gradient(a, grad_phi, coefficients).to(coefficients.dtype)
        return grad_a, grad_u, grad_c, None


class LearnedFunction(nn.Module):
    """phi_g(x) on every channel of group g: x [..., C] to [..., C]; `gated(a, u)` is phi(a) * u.

    Channels are split in `groups` runs of neighbours. phi_g(x) = b(x) + sum_m c_gm B_m(x), the coefficients
    c in the parameter `coefficients` [groups, K]. `basis="rational"` is phi_g(x) = P(x) / Q(x), K = 10
    coefficients p_0..p_5, q_0..q_3: P(x) = sum_n p_n x^n and Q(x) = 1 + (q_0 x + q_1 x^2)^2 + (q_2 x + q_3
    x^2)^2. Q is positive everywhere; its gradient vanishes only at q = 0, where this layer never starts.

    A B-spline is evaluated from a table of each interval's polynomial (`table`), not from basis functions;
    the other bases, but for a rational function, in chunks of rows. At an infinite x a B-spline is NaN or
    infinite, never finite.

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
        """phi(a) * u, or phi(a) where u is None, without a kernel: the definition."""
        return _Gated.apply(a, u, self.table() if self.is_spline else self.coefficients, self)

    def table(self) -> Tensor:
        """Polynomials of B-spline functions, [groups, G + 2, k + 1], fp32 or fp64, differentiable.

        Entry [g, j, p] is the coefficient of u^p on interval j - 1, u = (x - left edge) / step; rows 0 and
        G + 1 are the linear continuations outside the grid, with u measured from the grid's edge.
        """
        order = self.basis.order
        c = at_least_fp32(self.coefficients)
        pieces = torch.tensor(uniform_pieces(order), dtype=c.dtype, device=c.device)  # [k+1, k+1]
        slopes = torch.tensor(
            [slope_of(piece) for piece in uniform_pieces(order)], dtype=c.dtype, device=c.device
        )  # [k+1, k]
        inner = c.unfold(-1, order + 1, 1) @ pieces  # [groups, G, k+1]
        first, last = c[:, : order + 1], c[:, -order - 1 :]
        left = torch.stack((first @ pieces[:, 0], first @ slopes[:, 0]), dim=-1)
        right = torch.stack((last @ pieces.sum(1), last @ slopes.sum(1)), dim=-1)
        width = max(order + 1, 2)
        outer = [F.pad(end, (0, width - 2)).unsqueeze(1) for end in (left, right)]
        return torch.cat((outer[0], F.pad(inner, (0, width - order - 1)), outer[1]), dim=1)

    @torch.no_grad()
    def refine(self, grid_size: int, allow_coarsen: bool = False) -> float:
        """Change the grid to `grid_size` intervals and refit the coefficients by least squares over the grid.

        Multiples of the present size keep B-spline functions exactly. Returns the drift, rms(new - old) /
        rms(old) of the learned functions on the grid. `coefficients` becomes a new parameter: build
        optimisers anew.

        Raises:
            ValueError: fewer intervals without `allow_coarsen`, grid_size < 1, a rational function.
        """
        if self.is_rational:
            raise ValueError("basis: a 'rational' function has no grid to refine; choose a spline basis")
        check_finer(grid_size, self.basis.grid_size, allow_coarsen)
        old = self.basis
        basis = make_basis(self.basis_name, grid_size, old.order, old.grid_min, old.grid_max)
        points = even_points(basis.grid_points()).to(self.coefficients.device)
        new_values, old_values = basis.values(points), old.values(points)  # [points, K, 1]
        even = points.new_full((len(points),), 1 / len(points))
        mapping = refit_map([(new_values, old_values, even)]).squeeze(0)  # [K_new, K_old]
        plain = self.coefficients.double()
        before = plain @ old_values.squeeze(-1).t()
        change = plain @ mapping.t() @ new_values.squeeze(-1).t() - before
        coefficients = (plain @ mapping.t()).to(self.coefficients.dtype)
        self.basis = basis
        self.coefficients = nn.Parameter(coefficients, requires_grad=self.coefficients.requires_grad)
        return float(change.norm() / before.norm().clamp_min(1e-300))

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index int64 [..., C] into the rows of `table` (flattened over groups) and the position u."""
        intervals = self.basis.grid_size
        position = (at_least_fp32(x) - self.basis.grid_min) * (1 / self.basis.step)
        index = position.floor().clamp(-1, intervals)
        u = position - index.clamp(min=0)
        group = torch.arange(self.groups, device=x.device).repeat_interleave(self.channels // self.groups)
        # A NaN has no interval; it must come out as NaN, not as an index outside the memory.
        return (index.long() + 1).clamp(0, intervals + 1) + group * (intervals + 2), u

    def _per_channel(self, coefficients: Tensor) -> Tensor:
        """[groups, K] to [K, C]."""
        return at_least_fp32(coefficients).t().repeat_interleave(self.channels // self.groups, dim=-1)

    def _value(self, a: Tensor, coefficients: Tensor) -> Tensor:
        return self._value_and_slope(a, coefficients, slope=False)[0].to(a.dtype)

    def _value_and_slope(
        self, a: Tensor, coefficients: Tensor, slope: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """phi(a) and phi'(a), fp32 or fp64; `coefficients` is the table of a B-spline."""
        x = at_least_fp32(a)
        derivative = None
        if self.is_spline:
            rows, u = self._rows(x)
            columns = coefficients.flatten(0, 1).t().contiguous()  # [k+1, rows]
            gathered = [column.take(rows) for column in columns]
            value = gathered[-1]
            for column in gathered[-2::-1]:
                value = torch.addcmul(column, value, u)
            if slope:
                degree = len(gathered) - 1
                derivative = gathered[-1] * degree
                for p in range(degree - 1, 0, -1):
                    derivative = torch.addcmul(gathered[p] * p, derivative, u)
                derivative = derivative * (1 / self.basis.step)
        elif self.is_rational:
            value, derivative = self._rational(x, self._per_channel(coefficients))
        else:
            c = self._per_channel(coefficients)  # [K, C]
            value = self._combined(self.basis.values, x, c)
            if slope:
                derivative = self._combined(self.basis.derivatives, x, c)
        if self.base is not None:
            value = value + F.silu(x)
            if derivative is not None:
                gate = torch.sigmoid(x)
                derivative = derivative + gate * (1 + x * (1 - gate))
        return value, derivative

    def _chunks(self, x: Tensor) -> list[slice]:
        """Slices of the rows of x [N, C] whose basis values are alive at once."""
        if torch.compiler.is_compiling():  # which fuses what follows the values with them
            return [slice(None)]
        return row_chunks(x, self.num_functions)

    def _combined(self, functions: Callable[[Tensor], Tensor], x: Tensor, c: Tensor) -> Tensor:
        """sum_m c_m f_m(x) [..., C] for functions(x) [..., K, C] and c [K, C]."""
        rows = x.reshape(-1, self.channels)
        chunks = self._chunks(rows)
        if len(chunks) <= 1:
            return (functions(x) * c).sum(-2)
        return torch.cat([(functions(rows[chunk]) * c).sum(-2) for chunk in chunks]).view_as(x)

    @staticmethod
    def _rational(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """P/Q and its derivative at x [..., C] for coefficients c [10, C]."""
        numerator, numerator_slope = c[5], 5 * c[5]
        for n in range(4, -1, -1):
            numerator = numerator * x + c[n]
        for n in range(4, 0, -1):
            numerator_slope = numerator_slope * x + n * c[n]
        first, second = (c[6] + c[7] * x) * x, (c[8] + c[9] * x) * x
        denominator = 1 + first.square() + second.square()
        denominator_slope = 2 * (first * (c[6] + 2 * c[7] * x) + second * (c[8] + 2 * c[9] * x))
        value = numerator / denominator
        return value, (numerator_slope - value * denominator_slope) / denominator

    def _coefficient_gradient(self, a: Tensor, grad: Tensor, coefficients: Tensor) -> Tensor:
        """Gradient of sum(grad * phi(a)) by `coefficients` (the table of a B-spline), fp32 or fp64."""
        x = at_least_fp32(a)
        if self.is_spline:
            rows, u = self._rows(x)
            rows, u, weights = rows.flatten(), u.flatten(), grad.flatten()
            empty = grad.new_zeros(coefficients.shape[:-1].numel())
            sums = [empty.index_add(0, rows, weights)]
            while len(sums) < coefficients.shape[-1]:
                weights = weights * u
                sums.append(empty.index_add(0, rows, weights))
            return torch.stack(sums, dim=-1).view_as(coefficients)
        x, grad = x.reshape(-1, self.channels), grad.reshape(-1, self.channels)
        if not self.is_rational:
            per_channel = x.new_zeros(self.num_functions, self.channels)  # [K, C]
            for chunk in self._chunks(x):
                per_channel = per_channel + (self.basis.values(x[chunk]) * grad[chunk].unsqueeze(-2)).sum(0)
            return per_channel.unflatten(-1, (self.groups, -1)).sum(-1).t()
        c = self._per_channel(coefficients)
        first, second = (c[6] + c[7] * x) * x, (c[8] + c[9] * x) * x
        denominator = 1 + first.square() + second.square()
        value, _ = self._rational(x, c)
        weights = grad / denominator
        by_coefficient = [(weights * x**n).sum(0) for n in range(6)]
        for term in (first, second):
            shared = weights * value * term * -2 * x
            by_coefficient += [shared.sum(0), (shared * x).sum(0)]
        return torch.stack(by_coefficient).unflatten(-1, (self.groups, -1)).sum(-1).t()
