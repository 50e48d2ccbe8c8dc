"""Formulas for learned functions: y = a f(b x + c) + d, f elementary, weighted by where the inputs lie.

After Liu et al. 2024, arXiv:2404.19756, sec. 2.5.1 (symbolification). A formula is a description with its R^2
beside it; nothing in the model is replaced by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import erf, expit

GOOD_ENOUGH = 0.999
"""Of the formulas that explain at least this share of the variance, the first of FUNCTIONS is taken."""

FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x": lambda x: x,
    "x^2": np.square,
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gauss": lambda x: np.exp(-np.square(x)),
    "sin": np.sin,
    "x^3": lambda x: x**3,
    "abs": np.abs,
    "exp": lambda x: np.exp(np.minimum(x, 30)),
}
"""Simplest first."""
STARTS = ((1.0, 0.0), (2.0, 0.0), (0.5, 0.0), (1.0, 1.0), (1.0, -1.0), (-1.0, 0.0))
"""Initial (b, c)."""


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
        return self.a * FUNCTIONS[self.name](self.b * x + self.c) + self.d

    def __str__(self) -> str:
        inner = f"{self.b:.3g} x {self.c:+.3g}"
        if self.name == "x":
            return f"{self.a * self.b:.3g} x {self.a * self.c + self.d:+.3g}"
        shapes = {"x^2": f"({inner})^2", "x^3": f"({inner})^3"}
        return f"{self.a:.3g} {shapes.get(self.name, f'{self.name}({inner})')} {self.d:+.3g}"


def formula(x: Sequence[float], y: Sequence[float], density: Sequence[float] | None = None) -> Formula:
    """The simplest of the formulas that is good enough, else the best.

    ValueError for points that are not finite, or fewer than 5.
    """
    points, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(points) < 5 or not (np.isfinite(points).all() and np.isfinite(values).all()):
        raise ValueError(f"points: expected at least 5 finite ones, got {len(points)}")
    weights = np.ones_like(points) if density is None else np.asarray(density, dtype=float) + 0.01
    found = []
    for name in FUNCTIONS:
        found.append(_fitted(name, points, values, weights))
        if found[-1].r2 >= GOOD_ENOUGH:
            return found[-1]
    return max(found, key=lambda candidate: candidate.r2)


def _fitted(name: str, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Formula:
    """Least squares over (b, c) from several starts; a and d solve a linear problem for each (b, c)."""
    root = np.sqrt(weights)
    mean = np.average(y, weights=weights)
    total = max(float(np.sum(weights * (y - mean) ** 2)), 1e-30)

    def outer(b: float, c: float) -> tuple[float, float]:
        columns = np.stack([FUNCTIONS[name](b * x + c), np.ones_like(x)], axis=1)
        a, d = np.linalg.lstsq(columns * root[:, None], y * root, rcond=None)[0]
        return float(a), float(d)

    def curve(_: np.ndarray, b: float, c: float) -> np.ndarray:
        a, d = outer(b, c)
        return (a * FUNCTIONS[name](b * x + c) + d) * root

    best = None
    for start in STARTS[:1] if name == "x" else STARTS:
        b, c = start
        if name != "x":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)  # a flat direction has no covariance
                try:
                    (b, c), _ = curve_fit(curve, x, y * root, p0=start, maxfev=300)
                except RuntimeError:  # no convergence from this start
                    continue
        a, d = outer(b, c)
        left = float(np.sum(weights * (a * FUNCTIONS[name](b * x + c) + d - y) ** 2))
        if best is None or left < best[0]:
            best = (left, a, float(b), float(c), d)
    if best is None:
        return Formula(name, 0.0, 1.0, 0.0, float(mean), 0.0)
    left, a, b, c, d = best
    return Formula(name, a, b, c, d, 1 - left / total)
