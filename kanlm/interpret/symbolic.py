"""Formulas for learned functions: y = a f(b x + c) + d, f elementary, fitted where the inputs lie.

After Liu et al. 2024, arXiv:2404.19756, sec. 2.5.1 (symbolification), for many functions at once: every
(b, c) of a grid for every f is one matrix product over all functions of an input, as the best a and d are
those of a linear regression; the best of each f is then refined by Levenberg-Marquardt steps on (b, c).

Shapes: F inputs, Q points, O functions of each input, M candidates (f, b, c).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT = 0.2
THRESHOLD = 0.99
REFINED = 4096
"""Functions of a layer up to which (b, c) are refined; beyond, the grid's best stand."""


@dataclass(frozen=True)
class Elementary:
    """f, its complexity, and where it is defined: `everywhere`, `positive` or `nonzero`."""

    function: Callable[[Tensor], Tensor]
    complexity: int
    domain: str = "everywhere"
    shape: str = "{f}({u})"
    symmetric: bool = False
    """f(-u) is f(u) or -f(u), so a negative b says nothing new."""


def _sympy(name: str, u: Any) -> Any:
    import sympy

    own = {
        "silu": lambda: u / (1 + sympy.exp(-u)),
        "sigmoid": lambda: 1 / (1 + sympy.exp(-u)),
        "gelu": lambda: u * (1 + sympy.erf(u / sympy.sqrt(2))) / 2,
        "relu": lambda: sympy.Max(u, 0),
        "gauss": lambda: sympy.exp(-(u**2)),
        "abs": lambda: sympy.Abs(u),
        "x": lambda: u,
        "x^2": lambda: u**2,
        "x^3": lambda: u**3,
        "x^4": lambda: u**4,
        "1/x": lambda: 1 / u,
    }
    return own[name]() if name in own else getattr(sympy, name)(u)


LIBRARY: dict[str, Elementary] = {
    "x": Elementary(lambda u: u, 1, symmetric=True),
    "x^2": Elementary(torch.square, 2, shape="({u})^2", symmetric=True),
    "abs": Elementary(torch.abs, 2, symmetric=True),
    "relu": Elementary(F.relu, 2),
    "exp": Elementary(lambda u: torch.exp(u.clamp(max=30)), 2),
    "sin": Elementary(torch.sin, 2, symmetric=True),
    "cos": Elementary(torch.cos, 2, symmetric=True),
    "log": Elementary(torch.log, 2, "positive"),
    "sqrt": Elementary(torch.sqrt, 2, "positive"),
    "1/x": Elementary(torch.reciprocal, 2, "nonzero", shape="1/({u})"),
    "x^3": Elementary(lambda u: u**3, 3, shape="({u})^3", symmetric=True),
    "tanh": Elementary(torch.tanh, 3, symmetric=True),
    "sigmoid": Elementary(torch.sigmoid, 3, symmetric=True),
    "silu": Elementary(F.silu, 3),
    "gelu": Elementary(F.gelu, 3),
    "gauss": Elementary(lambda u: torch.exp(-u.square()), 3, symmetric=True),
    "x^4": Elementary(lambda u: u**4, 4, shape="({u})^4", symmetric=True),
}
"""Simplest first."""
AFFINE_COPIES = {"cos": "sin", "sigmoid": "tanh"}
"""f that an affine map inside and outside turns into another; not tried where the other is."""
NAMES = tuple(LIBRARY)


def _sum(factor: float, text: str, rest: float) -> str:
    """factor text + rest, to three digits, without a factor of one or a rest that does not show."""
    product = text if f"{factor:.3g}" == "1" else f"{factor:.3g} {text}"
    return product if abs(rest) < 5e-4 * abs(factor) else f"{product} {rest:+.3g}"


@dataclass(frozen=True)
class Formula:
    """a f(b x + c) + d and the share of the variance that it explains (R^2 under the inputs' density)."""

    name: str
    a: float
    b: float
    c: float
    d: float
    r2: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        inner = torch.as_tensor(self.b * np.asarray(x, dtype=float) + self.c)
        return self.a * LIBRARY[self.name].function(inner).numpy() + self.d

    def __str__(self) -> str:
        if self.name == "x":
            return _sum(self.a * self.b, "x", self.a * self.c + self.d)
        return _sum(self.a, LIBRARY[self.name].shape.format(f=self.name, u=_sum(self.b, "x", self.c)), self.d)

    def sympy(self, x: Any = None, digits: int = 4) -> Any:
        """The formula as a SymPy expression of `x` (default: the symbol x), constants to `digits` digits."""
        import sympy

        x = sympy.Symbol("x") if x is None else x
        a, b, c, d = (sympy.Float(value, digits) for value in (self.a, self.b, self.c, self.d))
        if self.name == "x":
            return sympy.Float(self.a * self.b, digits) * x + sympy.Float(self.a * self.c + self.d, digits)
        return a * _sympy(self.name, b * x + c) + d

    def latex(self, digits: int = 4) -> str:
        import sympy

        return sympy.latex(self.sympy(digits=digits))


@dataclass
class Formulas:
    """The best formula of each of [F, O] functions: `name` is an index into NAMES, the rest as in `Formula`.

    skipped: candidates (f, b, c) of an input that are not defined on the range that the input visits, by
    name.
    """

    name: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    r2: Tensor
    low: Tensor
    high: Tensor
    skipped: dict[str, int] = field(default_factory=dict)

    def formula(self, place: int, output: int) -> Formula:
        numbers = (float(tensor[place, output]) for tensor in (self.a, self.b, self.c, self.d, self.r2))
        return Formula(NAMES[int(self.name[place, output])], *numbers)

    def values(self, x: Tensor) -> Tensor:
        """All formulas at x [N, F]: [N, F, O]; one with a domain goes on as a constant beyond its range."""
        y = torch.zeros(len(x), *self.name.shape, dtype=x.dtype)
        for index in self.name.unique().tolist():
            kind = LIBRARY[NAMES[index]]
            place, output = (self.name == index).nonzero(as_tuple=True)
            points = x[:, place]  # [N, functions of this kind]
            if kind.domain != "everywhere":
                points = points.clamp(self.low[place], self.high[place])
            inner = points * self.b[place, output] + self.c[place, output]
            y[:, place, output] = self.a[place, output] * kind.function(inner) + self.d[place, output]
        return y


def tried_names(library: Sequence[str] | None = None) -> list[str]:
    """The names of `library` (default: all), without those that are copies of another in it.

    Raises:
        ValueError: an unknown name.
    """
    names = list(NAMES) if library is None else list(library)
    for name in names:
        if name not in LIBRARY:
            raise ValueError(f"library: unknown function {name!r}; choose from {', '.join(NAMES)}")
    return [name for name in names if AFFINE_COPIES.get(name) not in names]


def _inner_maps(name: str) -> list[tuple[float, float]]:
    """(b, c) of the grid, for an input of mean 0 and variance 1."""
    shifts = [-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    if name == "x":
        return [(1.0, 0.0)]
    if name in ("x^2", "x^3", "x^4", "abs"):
        return [(1.0, c) for c in shifts]
    if name == "relu":
        return [(b, c) for b in (1.0, -1.0) for c in shifts]
    if name == "exp":  # a shift inside is a factor outside
        return [(sign * b, 0.0) for b in (0.25, 0.5, 1.0, 2.0) for sign in (1, -1)]
    if LIBRARY[name].domain != "everywhere":
        return [(b, c) for b in (1.0, -1.0) for c in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)]
    if name in ("sin", "cos"):
        return [(b, c * math.pi / 4) for b in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0) for c in range(4)]
    signs = (1,) if LIBRARY[name].symmetric else (1, -1)
    return [(sign * b, c) for b in (0.5, 1.0, 2.0) for c in (-2.0, -1.0, 0.0, 1.0, 2.0) for sign in signs]


def _is_defined(name: str, first: Tensor, last: Tensor) -> Tensor:
    """Whether f is defined between b low + c and b high + c; of a sine there must be a quarter of a period.

    Over less a sine is a parabola with three constants too many.
    """
    if name in ("sin", "cos"):
        return (last - first).abs() >= math.pi / 2
    domain = LIBRARY[name].domain
    if domain == "positive":
        return torch.minimum(first, last) > 1e-3
    if domain == "nonzero":
        return (first * last > 0) & (torch.minimum(first.abs(), last.abs()) > 1e-2)
    return torch.ones_like(first, dtype=torch.bool)


@torch.no_grad()
def fit_functions(
    x: Tensor,
    y: Tensor,
    *,
    weights: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    library: Sequence[str] | None = None,
    weight: float = WEIGHT,
    refine: bool | None = None,
) -> Formulas:
    """The formula of each function y [F, Q, O] at points x [F, Q], with weights [F, Q] (default: equal).

    Of the names in `library` that one is chosen which is least in weight * complexity + (1 - weight) *
    log2(1 + 1e-5 - R^2): with weight 0 the best fit, with weight 1 the simplest. low, high [F]: the range
    that the inputs visit (default: that of x); candidates that are not defined all over it are skipped.

    Raises:
        ValueError: an unknown name, or a weight outside 0..1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: lies in 0..1 (0 the best fit, 1 the simplest), got {weight}")
    names = tried_names(library)
    x, y = x.double(), y.double()
    low = x.amin(1) if low is None else low.double()
    high = x.amax(1) if high is None else high.double()
    shares = torch.ones_like(x) if weights is None else weights.double()
    shares = shares / shares.sum(1, keepdim=True)
    middle = (shares * x).sum(1, keepdim=True)
    scale = (shares * (x - middle).square()).sum(1, keepdim=True).sqrt().clamp_min(1e-9)
    root = shares.sqrt()  # [F, Q]
    mean = (shares.unsqueeze(-1) * y).sum(1)  # [F, O]
    centred = (y - mean.unsqueeze(1)) * root.unsqueeze(-1)
    total = centred.square().sum(1).clamp_min(1e-30)  # [F, O]
    directions = centred / total.sqrt().unsqueeze(1)
    refine = y.shape[0] * y.shape[2] <= REFINED if refine is None else refine
    skipped: dict[str, int] = {}
    best: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # R^2, b, c [F, O]
    for name in names:
        maps = torch.tensor(_inner_maps(name), dtype=x.dtype)  # [M, 2]
        slope = maps[:, 0] / scale  # [F, M]
        shift = maps[:, 1] - slope * middle
        if LIBRARY[name].domain == "everywhere" and name not in ("x", "x^2", "x^3", "x^4", "abs", "relu"):
            plain = torch.tensor([1.0, -1.0], dtype=x.dtype).expand(len(x), -1)  # as the formulas in books
            slope, shift = torch.cat([slope, plain], 1), torch.cat([shift, torch.zeros_like(plain)], 1)
        defined = _is_defined(name, slope * low.unsqueeze(1) + shift, slope * high.unsqueeze(1) + shift)
        skipped[name] = int((~defined).sum())
        inner = slope.unsqueeze(-1) * x.unsqueeze(1) + shift.unsqueeze(-1)  # [F, M, Q]
        inner = torch.where(defined.unsqueeze(-1), inner, torch.ones_like(inner))
        values = LIBRARY[name].function(inner)
        values = (values - (values * shares.unsqueeze(1)).sum(-1, keepdim=True)) * root.unsqueeze(1)
        norm = values.square().sum(-1, keepdim=True)
        values = torch.where(norm > 1e-20, values / norm.clamp_min(1e-20).sqrt(), torch.zeros_like(values))
        r2, chosen = torch.bmm(values, directions).square_().max(dim=1)  # of [F, M, O]
        b, c = slope.gather(1, chosen), shift.gather(1, chosen)
        if refine and name != "x":
            r2, b, c = _refined(name, x, centred, shares, total, low, high, r2, b, c)
        best[name] = (r2.clamp(0, 1), b, c)
    score = torch.stack(
        [
            weight * LIBRARY[name].complexity + (1 - weight) * torch.log2(1 + 1e-5 - best[name][0])
            for name in names
        ]
    )  # [names, F, O]
    winner = score.argmin(0)
    picked = [
        torch.stack([best[name][part] for name in names]).gather(0, winner.unsqueeze(0)).squeeze(0)
        for part in range(3)
    ]
    index = torch.tensor([NAMES.index(name) for name in names])[winner]
    result = Formulas(
        index, *(torch.zeros_like(mean) for _ in range(4)), picked[0], low, high, skipped=skipped
    )
    result.b, result.c = picked[1], picked[2]
    for place_of in range(len(names)):
        name = names[place_of]
        place, output = (winner == place_of).nonzero(as_tuple=True)
        for part in range(0, len(place), 100_000):
            i, o = place[part : part + 100_000], output[part : part + 100_000]
            values = LIBRARY[name].function(result.b[i, o].unsqueeze(1) * x[i] + result.c[i, o].unsqueeze(1))
            average = (values * shares[i]).sum(1)
            deviation = (values - average.unsqueeze(1)) * root[i]
            a = (deviation * centred[i, :, o]).sum(1) / deviation.square().sum(1).clamp_min(1e-20)
            result.a[i, o], result.d[i, o] = a, mean[i, o] - a * average
    return result


def _refined(
    name: str,
    x: Tensor,
    centred: Tensor,
    shares: Tensor,
    total: Tensor,
    low: Tensor,
    high: Tensor,
    r2: Tensor,
    b: Tensor,
    c: Tensor,
    steps: int = 25,
) -> tuple[Tensor, Tensor, Tensor]:
    """R^2, b, c [F, O] after Levenberg-Marquardt steps; a, d are eliminated (Golub & Pereyra 1973)."""
    function = LIBRARY[name].function
    targets = centred.transpose(1, 2)  # [F, O, Q]
    points, share = x.unsqueeze(1), shares.unsqueeze(1)  # [F, 1, Q]
    root = share.sqrt()
    damping = torch.full_like(r2, 1e-2)

    def weighted(values: Tensor) -> Tensor:
        return (values - (values * share).sum(-1, keepdim=True)) * root

    for _ in range(steps):
        inner = (b.unsqueeze(-1) * points + c.unsqueeze(-1)).requires_grad_()  # [F, O, Q]
        with torch.enable_grad():
            values = function(inner)
            (slope,) = torch.autograd.grad(values.sum(), inner)
        values = weighted(values.detach())
        norm = values.square().sum(-1, keepdim=True).clamp_min(1e-20)
        a = (values * targets).sum(-1, keepdim=True) / norm
        rest = targets - a * values
        by_c, by_b = weighted(slope), weighted(slope * points)
        by_c = a * (by_c - values * (by_c * values).sum(-1, keepdim=True) / norm)
        by_b = a * (by_b - values * (by_b * values).sum(-1, keepdim=True) / norm)
        bb, cc, bc = by_b.square().sum(-1), by_c.square().sum(-1), (by_b * by_c).sum(-1)
        down_b, down_c = (by_b * rest).sum(-1), (by_c * rest).sum(-1)
        bb, cc = bb * (1 + damping) + 1e-12, cc * (1 + damping) + 1e-12
        determinant = (bb * cc - bc.square()).clamp_min(1e-20)
        new_b = b + (cc * down_b - bc * down_c) / determinant
        new_c = c + (bb * down_c - bc * down_b) / determinant
        defined = _is_defined(name, new_b * low.unsqueeze(1) + new_c, new_b * high.unsqueeze(1) + new_c)
        defined &= new_b.isfinite() & new_c.isfinite()
        new_b, new_c = torch.where(defined, new_b, b), torch.where(defined, new_c, c)
        values = weighted(function(new_b.unsqueeze(-1) * points + new_c.unsqueeze(-1)))
        norm = values.square().sum(-1).clamp_min(1e-20)
        found = (values * targets).sum(-1).square() / norm / total
        better = (found > r2) & found.isfinite() & defined
        r2, b, c = (
            torch.where(better, found, r2),
            torch.where(better, new_b, b),
            torch.where(better, new_c, c),
        )
        damping = torch.where(better, damping * 0.3, damping * 5).clamp(1e-8, 1e8)
    return r2, b, c


def formula(
    x: Sequence[float],
    y: Sequence[float],
    density: Sequence[float] | None = None,
    *,
    library: Sequence[str] | None = None,
    weight: float = WEIGHT,
) -> Formula:
    """The formula of one function given at points, weighted by `density`; see `fit_functions`.

    Raises:
        ValueError: points that are not finite, fewer than 5, and what `fit_functions` raises.
    """
    points, values = torch.tensor(list(x), dtype=torch.float64), torch.tensor(list(y), dtype=torch.float64)
    if len(points) < 5 or not (points.isfinite().all() and values.isfinite().all()):
        raise ValueError(f"points: expected at least 5 finite ones, got {len(points)}")
    shares = None if density is None else torch.tensor(list(density), dtype=torch.float64).unsqueeze(0) + 0.01
    fitted = fit_functions(
        points.unsqueeze(0),
        values.view(1, -1, 1),
        weights=shares,
        library=library,
        weight=weight,
        refine=True,
    )
    return fitted.formula(0, 0)
