# Copyright 2026 The kanlm authors. Licensed under the Apache License, Version 2.0.
"""Basis functions of one real variable: x [..., I] to values and derivatives [..., K, I].

Shapes: I inputs, K basis functions, G grid intervals, k order (polynomial degree). A basis is evaluated once
per input, whatever the number of outputs. Inputs stay the last, contiguous dimension, so that every step is a
long vector operation and `values(x).flatten(-2)` is the left operand of a matrix product without a copy.

Half precision is evaluated in fp32: a cubic B-spline in bf16 is off by 1e-2 and no longer sums to one.

Outside the grid every function goes on linearly, with the value and slope it has at the edge (Fourier: it is
periodic). The right edge belongs to the grid.

References: de Boor 1978 (B-splines), Schoenberg 1946 (uniform ones), Li 2024, arXiv:2405.06721 (Gaussians
for KANs), Delis 2024, FasterKAN (reflectional switch), Sidharth & Gokul 2024, arXiv:2405.07200 (Chebyshev),
Xu et al. 2024, arXiv:2406.01034 (Fourier), Bozorgasl & Chen 2024, arXiv:2405.12832 (wavelets), Yang & Wang
2024, arXiv:2409.10594 (rational functions).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ORDER = 5
"""Highest order of B-splines, here and in a model's configuration."""


INITIAL_FUNCTIONS = {
    "zero": torch.zeros_like,
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    # What functions that begin as GELU after a hidden norm turn into, whatever the seed and the text.
    "gelu_wave": lambda x: F.gelu(x) - 0.4 * (x + 0.7) * torch.exp(-0.5 * (x + 0.7) ** 2),
}
"""What a learned function can be at the start."""


def at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class ExactBuffers(nn.Module):
    """A module whose buffers stay fp32 at least where `model.to(torch.bfloat16)` casts them.

    Rounded frequencies would be off by whole radians at position 1000, a rounded whitening in every function.
    """

    def _apply(self, fn, recurse=True):
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, cast in self._buffers.items():
            if cast is not None and cast.dtype.itemsize < 4:
                self._buffers[name] = exact[name].to(cast.device)
        return self


def check_choice(field: str, value, known: Iterable) -> None:
    """ValueError naming `field` for a `value` that is none of those `known`."""
    if value not in known:
        names = ", ".join(str(name) for name in known)
        raise ValueError(f"{field}: unknown value {value!r}; choose one of {names}")


def per_channel(coefficients: Tensor, channels: int) -> Tensor:
    """Coefficients [groups, K] as [K, C]: a group is a run of neighbours among the C channels."""
    return at_least_fp32(coefficients).t().repeat_interleave(channels // len(coefficients), dim=-1)


def _piece(k: int, r: int) -> tuple[float, ...]:
    """Piece r of a uniform B-spline of order k: the powers of u + k - r - i, multiplied out."""
    shifts = [((-1) ** i * math.comb(k + 1, i), k - r - i) for i in range(k - r + 1)]
    sums = [sum(factor * shift ** (k - p) for factor, shift in shifts) for p in range(k + 1)]
    return tuple(math.comb(k, p) * total / math.factorial(k) for p, total in enumerate(sums))


UNIFORM_PIECES = tuple(tuple(_piece(k, r) for r in range(k + 1)) for k in range(MAX_ORDER + 1))
"""Polynomial pieces of uniform B-splines: entry [k][r][p] is the coefficient of u^p, u in [0, 1].

On an interval, with u the position in it, the functions of order k that are not zero are B_{j+r} = sum_p
[k][r][p] u^p for r = 0..k. They follow from Schoenberg's truncated powers (1946), B(t) = sum_i (-1)^i
C(k+1, i) (t - i)_+^k / k!, at t = u + k - r.
"""


def slope_of(piece: tuple[float, ...]) -> tuple[float, ...]:
    """Coefficients of the derivative of the polynomial sum_p piece[p] u^p."""
    return tuple(p * value for p, value in enumerate(piece))[1:] or (0.0,)


def horner(coefficients: tuple[float, ...], u: Tensor) -> Tensor:
    """sum_p coefficients[p] u^p."""
    if len(coefficients) == 1:
        return u * 0 + coefficients[0]  # NaN where u is
    total = u * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        total = total * u + coefficient
    return total


def spread(index: Tensor, pieces: list[Tensor], count: int) -> Tensor:
    """Zeros [..., count, I] with pieces[r] [..., I] in row index + r, index [..., I]."""
    rows = torch.stack([index + r for r in range(len(pieces))], dim=-2)  # [..., k+1, I]
    stacked = torch.stack(pieces, dim=-2)
    dense = stacked.new_zeros(*index.shape[:-1], count, index.shape[-1])
    return dense.scatter(-2, rows, stacked)  # [..., count, I]


@dataclass(frozen=True)
class Basis:
    """K functions on the grid [grid_min, grid_max] of `grid_size` intervals; see `make_basis`."""

    grid_size: int
    grid_min: float
    grid_max: float
    order: int = 3

    function_flops: ClassVar[int]
    """Forward FLOPs of one function at one input; exp, tanh and the like count as 1."""

    def __post_init__(self):
        grid_size, order, grid_min, grid_max = self.grid_size, self.order, self.grid_min, self.grid_max
        if not isinstance(grid_size, int) or grid_size < 1:
            raise ValueError(f"grid_size: must be an int of at least 1, got {grid_size!r}")
        if not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order: must be an int in 0..{MAX_ORDER}, got {order!r}; 3 is cubic")
        if not (math.isfinite(grid_min) and math.isfinite(grid_max) and grid_min < grid_max):
            raise ValueError(
                f"grid_min, grid_max: must be finite and ascending, got {grid_min!r} and {grid_max!r}; "
                "-3.0 and 3.0 are the defaults"
            )
        step, magnitude = (grid_max - grid_min) / grid_size, max(abs(grid_min), abs(grid_max))
        if not (step > magnitude * 2**-22 and 1 / step < 1e30):  # a few of fp32's own steps; no overflow
            raise ValueError(
                f"grid_min, grid_max: intervals of {step:.3g} from {grid_min!r} to {grid_max!r} are too "
                "narrow for fp32; scale the input, widen the grid or take fewer intervals"
            )

    @property
    def num_functions(self) -> int:
        return self.grid_size + 1

    @property
    def step(self) -> float:
        """Length of a grid interval."""
        return (self.grid_max - self.grid_min) / self.grid_size

    @property
    def values_flops(self) -> int:
        """Forward FLOPs of `values` at one input."""
        return self.num_functions * self.function_flops

    @property
    def combine_flops(self) -> int:
        """Forward FLOPs of `combine` at one input."""
        return self.values_flops + 2 * self.num_functions

    def grid_points(self) -> Tensor:
        """The G + 1 ends of the intervals, fp64 [G + 1, 1] on the CPU."""
        ends = self.grid_min, self.grid_max, self.grid_size + 1
        return torch.linspace(*ends, dtype=torch.float64, device="cpu").unsqueeze(-1)

    def values(self, x: Tensor) -> Tensor:
        """B_m(x): x [..., I] to [..., K, I], fp32 or fp64."""
        x = at_least_fp32(x)
        inside = x.clamp(self.grid_min, self.grid_max)
        left, right = (self._derivatives(x.new_full((1,), end)) for end in (self.grid_min, self.grid_max))
        beyond = (x - inside).unsqueeze(-2)  # [..., 1, I]
        return self._values(inside) + beyond.clamp(max=0) * left + beyond.clamp(min=0) * right

    def derivatives(self, x: Tensor) -> Tensor:
        """dB_m/dx: x [..., I] to [..., K, I], fp32 or fp64; at a kink, the slope of one of its sides."""
        x = at_least_fp32(x)
        return self._derivatives(x.clamp(self.grid_min, self.grid_max))

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """sum_m c_gm B_m(x), g the group of the channel: [groups, K] and x [..., C] to [..., C]."""
        return (self.values(x) * per_channel(coefficients, x.shape[-1])).sum(-2)

    def initial_coefficients(self, name: str) -> Tensor:
        """Coefficients of the function `name` of INITIAL_FUNCTIONS, [K] fp64 on the CPU: least squares."""
        ends = self.grid_min, self.grid_max, 40 * self.num_functions + 1
        points = torch.linspace(*ends, dtype=torch.float64, device="cpu")
        values = self.values(points.unsqueeze(-1)).squeeze(-1)  # [points, K]
        target = INITIAL_FUNCTIONS[name](points).unsqueeze(-1)
        # By QR, as `values` has full rank: the default driver's rounding differs from call to call.
        return torch.linalg.lstsq(values, target, driver="gels").solution.squeeze(-1)

    def _distances(self, x: Tensor) -> Tensor:
        """From the G + 1 grid points, in grid steps: x [..., I] to [..., G + 1, I]."""
        nodes = torch.arange(self.grid_size + 1, device=x.device, dtype=x.dtype) * self.step + self.grid_min
        return (x.unsqueeze(-2) - nodes.unsqueeze(-1)) * (1 / self.step)

    def _values(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _derivatives(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BSpline(Basis):
    """Uniform B-splines of order k: K = G + k, at most k + 1 of them not zero, summing to one.

    Each interval's pieces are polynomials in the position u in the interval (`UNIFORM_PIECES`), so there is
    no recursion over orders.
    """

    @property
    def num_functions(self) -> int:
        return self.grid_size + self.order

    @property
    def values_flops(self) -> int:
        return 3 + (self.order + 1) * 2 * self.order  # the interval, then order + 1 polynomials

    @property
    def combine_flops(self) -> int:
        return 3 + 2 * self.order  # the interval, then one polynomial

    def values(self, x: Tensor) -> Tensor:
        interval, inside, beyond = self.place(x)
        pieces = UNIFORM_PIECES[self.order]
        values = [horner(piece, inside) + beyond * horner(slope_of(piece), inside) for piece in pieces]
        return spread(interval, values, self.num_functions)

    def derivatives(self, x: Tensor) -> Tensor:
        interval, inside, _ = self.place(x)
        slopes = [horner(slope_of(piece), inside) / self.step for piece in UNIFORM_PIECES[self.order]]
        return spread(interval, slopes, self.num_functions)

    def place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Interval int64, position in it 0..1, and how far x is outside the grid, in intervals; [..., I]."""
        u = (at_least_fp32(x) - self.grid_min) * (1 / self.step)
        interval = u.detach().floor().clamp(0, self.grid_size - 1)
        u = u - interval
        inside = u.clamp(0, 1)
        # A NaN has no interval; it must come out as NaN, not as an index outside the memory.
        return interval.long().clamp(0, self.grid_size - 1), inside, u - inside

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """As of every basis, by the polynomial of each x's interval: a gather, not K basis functions."""
        groups, channels = len(coefficients), x.shape[-1]
        position = (x - self.grid_min) * (1 / self.step)
        index = position.detach().floor().clamp(-1, self.grid_size)
        u = position - index.clamp(min=0)
        group = torch.arange(groups, device=x.device).repeat_interleave(channels // groups)
        # A NaN has no interval; it must come out as NaN, not as an index outside the memory.
        rows = (index.long() + 1).clamp(0, self.grid_size + 1) + group * (self.grid_size + 2)
        # Gathered power by power: the gradient of gathering whole rows takes three times as long.
        powers = self.table(coefficients).flatten(0, 1).t().contiguous()  # [k + 1, groups * (G + 2)]
        gathered = [power.index_select(0, rows.flatten()).view_as(x) for power in powers]
        total = gathered[-1]
        for coefficient in gathered[-2::-1]:
            total = torch.addcmul(coefficient, total, u)
        return total

    def table(self, coefficients: Tensor) -> Tensor:
        """The polynomials of sum_m c_gm B_m, [groups, G + 2, k + 1], fp32 or fp64, differentiable.

        Entry [g, j, p] is the coefficient of u^p on interval j - 1, u = (x - left edge) / step; rows 0 and
        G + 1 are the linear continuations outside the grid, with u measured from the grid's edge.
        """
        c = at_least_fp32(coefficients)
        pieces = torch.tensor(UNIFORM_PIECES[self.order], dtype=c.dtype, device=c.device)
        pieces = F.pad(pieces, (0, 2 - min(2, len(pieces))))  # a slope, 0, also at order 0
        inner = exact_product(c.unfold(-1, len(pieces), 1), pieces)  # [groups, G, powers]
        powers = torch.arange(inner.shape[-1], device=c.device)
        left, last = inner[:, :1] * (powers < 2), inner[:, -1:]
        right = torch.stack((last.sum(-1), (last * powers).sum(-1)), dim=-1)  # value and slope at u = 1
        return torch.cat((left, inner, F.pad(right, (0, len(powers) - 2))), dim=1)


def exact_product(matrix: Tensor, values: Tensor) -> Tensor:
    """matrix @ values in their own dtype, whatever autocast says."""
    if not torch.amp.is_autocast_available(values.device.type):
        return matrix @ values
    with torch.autocast(values.device.type, enabled=False):
        return matrix @ values


class Gaussian(Basis):
    """exp(-z^2), z the distance to a grid point: K = G + 1."""

    function_flops = 5

    def _values(self, x: Tensor) -> Tensor:
        z = self._distances(x)
        return torch.exp(-z * z)

    def _derivatives(self, x: Tensor) -> Tensor:
        z = self._distances(x)
        return torch.exp(-z * z) * z * (-2 / self.step)


class ReflectionalSwitch(Basis):
    """1 - tanh(z)^2, z the distance to a grid point: K = G + 1."""

    function_flops = 5

    def _values(self, x: Tensor) -> Tensor:
        tanh = torch.tanh(self._distances(x))
        return 1 - tanh * tanh

    def _derivatives(self, x: Tensor) -> Tensor:
        tanh = torch.tanh(self._distances(x))
        return (1 - tanh * tanh) * tanh * (-2 / self.step)


class MexicanHat(Basis):
    """2 / (sqrt(3) pi^(1/4)) (1 - z^2) exp(-z^2 / 2), z the distance to a grid point: K = G + 1."""

    function_flops = 7
    scale = 2 / (math.sqrt(3) * math.pi**0.25)

    def _values(self, x: Tensor) -> Tensor:
        square = self._distances(x).square()
        return (1 - square) * torch.exp(square * -0.5) * self.scale

    def _derivatives(self, x: Tensor) -> Tensor:
        z = self._distances(x)
        square = z * z
        return (square - 3) * z * torch.exp(square * -0.5) * (self.scale / self.step)


class Chebyshev(Basis):
    """Chebyshev polynomials T_0 .. T_G of the grid mapped to [-1, 1]: K = G + 1."""

    function_flops = 2

    def _mapped(self, x: Tensor) -> Tensor:
        return (x - self.grid_min) * (2 / (self.grid_max - self.grid_min)) - 1

    def _values(self, x: Tensor) -> Tensor:
        t = self._mapped(x)
        functions = [torch.ones_like(t), t]
        while len(functions) < self.num_functions:
            functions.append(2 * t * functions[-1] - functions[-2])
        return torch.stack(functions[: self.num_functions], dim=-2)

    def _derivatives(self, x: Tensor) -> Tensor:
        """dT_m/dt = m U_{m-1}(t), U the polynomials of the second kind."""
        t = self._mapped(x)
        second = [torch.ones_like(t), 2 * t]
        while len(second) < self.grid_size:
            second.append(2 * t * second[-1] - second[-2])
        functions = [torch.zeros_like(t)] + [m * second[m - 1] for m in range(1, self.num_functions)]
        return torch.stack(functions, dim=-2) * (2 / (self.grid_max - self.grid_min))


class Fourier(Basis):
    """1, cos(pi t), sin(pi t), cos(2 pi t), ... of the grid mapped to t in [-1, 1]: K = G + 1, periodic."""

    function_flops = 3

    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Angles of the functions 1..G [..., G, I] and their frequencies [G, 1]; odd ones are cosines."""
        numbers = torch.arange(1, self.grid_size + 1, device=x.device, dtype=x.dtype).unsqueeze(-1)
        frequencies = ((numbers + 1) / 2).floor() * (2 * math.pi / (self.grid_max - self.grid_min))
        phase = (numbers + 1) % 2 * (math.pi / 2)  # a sine is a cosine a quarter turn later
        return (x.unsqueeze(-2) - (self.grid_min + self.grid_max) / 2) * frequencies - phase, frequencies

    def values(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        angles, _ = self._angles(x)
        return torch.cat((torch.ones_like(x).unsqueeze(-2), angles.cos()), dim=-2)

    def derivatives(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        angles, frequencies = self._angles(x)
        return torch.cat((torch.zeros_like(x).unsqueeze(-2), -angles.sin() * frequencies), dim=-2)


RATIONAL_FITS = {
    "silu": (
        (3.4949337e-06, 0.5, 0.24998142, 0.053008988, 0.0056863941, 0.000260205),
        (0.26493473, -0.013261471, 0.18928171, 0.01856188),
    ),
    "gelu": (
        (-0.0023883712, 0.5, 0.41356217, 0.11339915, 0.010300634, 0.0),
        (0.40959986, 0.0, 0.24295322, 0.0),
    ),
}
"""p and q of `Rational`: least-squares fits on [-4, 4] with maximal errors 1.2e-5 and 2.4e-3."""


class Rational(Basis):
    """phi(x) = P(x) / Q(x), no sum over functions: p_0..p_5, q_0..q_3; inputs are expected on the grid.

    P(x) = sum_n p_n x^n and Q(x) = 1 + (q_0 x + q_1 x^2)^2 + (q_2 x + q_3 x^2)^2. Q is positive everywhere;
    its gradient vanishes only at q = 0, where no function starts. A safe Pade activation with coefficients
    that a group shares (Yang & Wang 2024).
    """

    num_functions = 10
    combine_flops = 19

    def combine(self, coefficients: Tensor, x: Tensor) -> Tensor:
        c = per_channel(coefficients, x.shape[-1])  # [10, C]
        numerator = c[5]
        for n in range(4, -1, -1):
            numerator = numerator * x + c[n]
        return numerator / (1 + ((c[6] + c[7] * x) * x).square() + ((c[8] + c[9] * x) * x).square())

    def initial_coefficients(self, name: str) -> Tensor:
        """Those of a fit, or of exactly the identity, p_0..p_5, q_0..q_3.

        Not of "zero", whose numerator would get no gradient through any denominator.
        """
        check_choice("initial", name, (*RATIONAL_FITS, "identity"))
        if name in RATIONAL_FITS:
            p, q = RATIONAL_FITS[name]
        else:  # x = x Q(x) / Q(x), with the Q of SiLU
            q = RATIONAL_FITS["silu"][1]
            p = (0.0, 1.0, 0.0, q[0] ** 2 + q[2] ** 2, 2 * (q[0] * q[1] + q[2] * q[3]), q[1] ** 2 + q[3] ** 2)
        return torch.tensor(p + q, dtype=torch.float64, device="cpu")


BASES = {
    "bspline": BSpline,
    "rbf": Gaussian,
    "relu_switch": ReflectionalSwitch,
    "chebyshev": Chebyshev,
    "fourier": Fourier,
    "wavelet": MexicanHat,
    "linear": BSpline,
}
"""Sums over functions, which functions of edges and of channels can be."""

FUNCTION_BASES = {**BASES, "rational": Rational}
"""What functions of channels can be."""


def make_basis(
    name: str, grid_size: int, order: int = 3, grid_min: float = -3.0, grid_max: float = 3.0
) -> Basis:
    """The basis `name` on a uniform grid of `grid_size` intervals on [grid_min, grid_max].

    K is grid_size + order for `bspline`, 10 for `rational`, grid_size + 1 for all others; `linear` is the
    B-spline of order 1, and only `bspline` reads `order`.

    Raises:
        ValueError: an unknown name, grid_size < 1, order outside 0..5, a grid that is empty, infinite or too
            narrow for fp32.
    """
    check_choice("basis", name, FUNCTION_BASES)
    return FUNCTION_BASES[name](grid_size, float(grid_min), float(grid_max), 1 if name == "linear" else order)
