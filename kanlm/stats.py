"""Judgement over seeds and sizes: paired intervals, equivalence, scaling laws. numpy and scipy only.

Diverged runs (NaN, inf) are not averaged away: they are an error here and a row of their own in a report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

MARGIN_NATS = 0.01
"""Losses closer than this (nats/token) count as equal."""


@dataclass(frozen=True)
class PairedDifference:
    """mean of a - b over pairs (same seed and data order), with a t interval of `confidence`."""

    mean: float
    low: float
    high: float
    std: float
    """Sample standard deviation of the differences (n - 1)."""
    pairs: int
    confidence: float
    p_value: float
    """Two-sided, of a mean difference of 0."""


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """Student's paired t interval of mean(a - b); a[i] and b[i] share the seed. Needs two pairs or more."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    difference = _differences(a, b)
    n = len(difference)
    mean, std = float(difference.mean()), float(difference.std(ddof=1))
    error = std / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    if error > 0:
        p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    else:
        p_value = float(mean == 0)
    return PairedDifference(mean, mean - half, mean + half, std, n, confidence, p_value)


@dataclass(frozen=True)
class Equivalence:
    """Verdict of two one-sided tests that |mean(a - b)| < margin."""

    mean: float
    low: float
    high: float
    """The 1 - 2 alpha interval: equivalent if and only if it lies inside (-margin, margin)."""
    margin: float
    alpha: float
    p_value: float
    """The larger of the two one-sided p values."""
    equivalent: bool


def equivalence(
    a: Sequence[float], b: Sequence[float], margin: float = MARGIN_NATS, alpha: float = 0.05
) -> Equivalence:
    """Two one-sided paired t tests (Schuirmann 1987).

    "Not equivalent" does not mean "different": there may be too few seeds to tell.
    """
    if not margin > 0:
        raise ValueError(f"margin: expected a positive number of nats, got {margin}")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha: expected a number in (0, 0.5), got {alpha}")
    interval = paired_difference(a, b, confidence=1 - 2 * alpha)
    error = interval.std / math.sqrt(interval.pairs)
    distance = margin - abs(interval.mean)  # from the nearer margin
    p_value = float(stats.t.sf(distance / error, interval.pairs - 1)) if error > 0 else float(distance <= 0)
    return Equivalence(interval.mean, interval.low, interval.high, margin, alpha, p_value, p_value < alpha)


def bootstrap_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile interval of mean(a - b) over resampled pairs; the same pairs give the same interval.

    With few pairs it is too narrow (of 3 pairs about 80% in place of 95%); Student's interval decides.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence}")
    difference = _differences(a, b)
    drawn = np.random.default_rng(0).choice(difference, size=(resamples, len(difference)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of a mean difference of 0, by swapping the members of pairs; exact up to 13 pairs.

    It assumes nothing of the noise but symmetry. With n pairs it cannot fall below 2 / 2^n.
    """
    difference = _differences(a, b)
    found = stats.permutation_test(
        (difference, -difference),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        random_state=0,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being several, step-down (Holm 1979): each at most 0.05 with 5% for any error."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * float(p_values[index]))
        adjusted[index] = min(1.0, largest)
    return adjusted.tolist()


def detectable_difference(std: float, pairs: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true mean difference that a two-sided paired t test at `alpha` finds with `power`.

    `std`: standard deviation of one pair's difference. By the noncentral t distribution.
    """
    if pairs < 2:
        raise ValueError(f"pairs: got {pairs}; a test needs at least 2 seeds")
    if not (std >= 0 and math.isfinite(std)):
        raise ValueError(f"std: expected a finite standard deviation, got {std}")
    if not (0 < alpha < 1 and alpha < power < 1):
        raise ValueError(f"power: expected alpha < power < 1, got alpha {alpha} and power {power}")
    degrees = pairs - 1
    critical = float(stats.t.ppf(1 - alpha / 2, degrees))

    def found(shift: float) -> float:
        far = stats.nct.cdf(-critical, degrees, shift)  # the wrong side, beyond it at 0 only
        return float(stats.nct.sf(critical, degrees, shift) + (far if math.isfinite(far) else 0.0))

    shift = optimize.brentq(lambda shift: found(shift) - power, 0.0, 4 * critical + 10)
    return float(shift) * std / math.sqrt(pairs)


def pairs_needed(std: float, difference: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs that detect `difference`; None above 1,000."""
    enough = (n for n in range(2, 1001) if detectable_difference(std, n, alpha, power) <= difference)
    return next(enough, None)


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"pairs: expected two lists of equal length, got {first.shape} and {second.shape}")
    if len(first) < 2:
        raise ValueError(f"pairs: got {len(first)}; an interval needs at least 2 seeds, run more")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("pairs: a value is NaN or infinite; report the diverged run apart")
    return first - second


@dataclass(frozen=True)
class ScalingFit:
    """loss(N) = irreducible + (scale / N)^exponent for one arm; `rms` is the fit's residual in nats."""

    irreducible: float
    scale: float
    exponent: float
    rms: float
    points: int

    def loss(self, size: float) -> float:
        return self.irreducible + (self.scale / size) ** self.exponent

    def size(self, loss: float) -> float:
        """The size that reaches `loss`; inf at or below the irreducible loss."""
        excess = loss - self.irreducible
        return self.scale / excess ** (1 / self.exponent) if excess > 0 else math.inf


def scaling_fits(points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, ScalingFit]:
    """Power laws of several arms, `{arm: (sizes, losses)}`, that share irreducible loss and exponent.

    Only the scale differs between arms, so `fit[a].scale / fit[b].scale` is the ratio of sizes that a and b
    need for equal loss, at every loss. Form: Hoffmann et al. 2022, eq. 2, in one variable. Least squares in
    nats; the exponent is searched on [0.01, 3], offset and factors solve a non-negative linear problem at
    each (variable projection). One arm needs three sizes, each further arm one point.
    """
    if not points:
        raise ValueError("points: expected at least one arm")
    arms = list(points)
    sizes = [np.asarray(points[arm][0], dtype=float) for arm in arms]
    losses = [np.asarray(points[arm][1], dtype=float) for arm in arms]
    for arm, size, loss in zip(arms, sizes, losses, strict=True):
        if size.ndim != 1 or size.shape != loss.shape or not len(size):
            raise ValueError(
                f"points.{arm}: expected as many sizes as losses, got {size.shape} and {loss.shape}"
            )
        if not (np.isfinite(size).all() and np.isfinite(loss).all() and (size > 0).all()):
            raise ValueError(
                f"points.{arm}: sizes must be positive and losses finite; leave diverged runs out"
            )
    if max(len(np.unique(size)) for size in sizes) < 3:
        raise ValueError("points: no arm has three different sizes; offset, scale and exponent need three")
    x, y = np.concatenate(sizes), np.concatenate(losses)
    arm_index = np.repeat(np.arange(len(arms)), [len(size) for size in sizes])
    middle = np.exp(np.log(x).mean())

    def solved(exponent: float) -> tuple[np.ndarray, float]:
        columns = np.zeros((len(x), 1 + len(arms)))
        columns[:, 0] = 1.0
        columns[np.arange(len(x)), 1 + arm_index] = (x / middle) ** -exponent
        return optimize.nnls(columns, y)

    grid = np.geomspace(0.01, 3.0, 200)
    best = int(np.argmin([solved(exponent)[1] for exponent in grid]))
    exponent = float(
        optimize.minimize_scalar(
            lambda log_exponent: solved(math.exp(log_exponent))[1],
            bounds=(math.log(grid[max(best - 1, 0)]), math.log(grid[min(best + 1, len(grid) - 1)])),
            method="bounded",
            options={"xatol": 1e-10},
        ).x
    )
    exponent = math.exp(exponent)
    (irreducible, *factors), residual = solved(exponent)
    rms = float(residual) / math.sqrt(len(x))
    return {
        arm: ScalingFit(
            float(irreducible), float(middle * factor ** (1 / exponent)), exponent, rms, len(points[arm][0])
        )
        for arm, factor in zip(arms, factors, strict=True)
    }


def scaling_fit(sizes: Sequence[float], losses: Sequence[float]) -> ScalingFit:
    """`scaling_fits` of one arm."""
    return scaling_fits({"arm": (sizes, losses)})["arm"]
