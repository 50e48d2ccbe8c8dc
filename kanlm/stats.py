"""Judgement over seeds and sizes: paired intervals, equivalence, scaling laws. numpy and scipy only.

Diverged runs (NaN, inf) are not averaged away: they are an error here and a row of their own in a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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


def holm_levels(p_values: Sequence[float], alpha: float = 0.05) -> list[float]:
    """The level at which Holm's procedure tests each: alpha over those left, and no lower after a failure."""
    levels, left = [alpha] * len(p_values), len(p_values)
    for index in np.argsort(p_values, kind="stable"):
        levels[index] = alpha / left
        if p_values[index] <= alpha / left:
            left -= 1
    return levels


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


@dataclass(frozen=True)
class Evidence:
    """What pairs of losses say of the mean of a - b, nats/token, as one of several comparisons."""

    mean: float
    std: float
    """Of the paired differences over seeds."""
    p_value: float
    p_holm: float
    """Adjusted over all of the comparisons."""
    p_sign_flip: float
    confidence: float
    """Of the intervals: the level at which Holm's procedure tested this one, so that Student's excludes 0
    exactly where `p_holm` is at most alpha."""
    interval: tuple[float, float]
    """Student's."""
    bootstrap: tuple[float, float]
    """Percentile interval over resampled seeds."""
    tie_interval: tuple[float, float]
    """Of 1 - 2 alpha: a tie where it lies within +-margin."""
    p_tie: float
    detectable: float
    """The smallest true difference that so many pairs find in 80% of comparisons."""


def family_evidence(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    margin: float = MARGIN_NATS,
    alpha: float = 0.05,
) -> list[Evidence]:
    """All that a judgement needs of several comparisons (a, b), of two pairs or more each; in their order."""
    tested = [paired_difference(a, b) for a, b in pairs]
    p_values = [one.p_value for one in tested]
    evidence = []
    for (a, b), one, p_holm, level in zip(
        pairs, tested, holm(p_values), holm_levels(p_values, alpha), strict=True
    ):
        tie, found = equivalence(a, b, margin, alpha), paired_difference(a, b, 1 - level)
        evidence.append(
            Evidence(
                mean=one.mean,
                std=one.std,
                p_value=one.p_value,
                p_holm=p_holm,
                p_sign_flip=sign_flip_p_value(a, b),
                confidence=1 - level,
                interval=(found.low, found.high),
                bootstrap=bootstrap_interval(a, b, 1 - level),
                tie_interval=(tie.low, tie.high),
                p_tie=tie.p_value,
                detectable=detectable_difference(one.std, one.pairs, level),
            )
        )
    return evidence


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
    """loss(N) = irreducible + (scale / N)^exponent of one arm; `rms` is the fit's residual in nats."""

    irreducible: float
    scale: float
    exponent: float
    rms: float
    points: int

    def loss(self, size: float) -> float:
        return self.irreducible + (self.scale / size) ** self.exponent

    def size(self, loss: float) -> float:
        """The size that reaches `loss`; inf at or below the irreducible loss."""
        power = max(loss - self.irreducible, 0.0) ** (1 / self.exponent)  # 0 at a rounding error above, too
        return self.scale / power if power > 0 else math.inf


EXPONENTS = np.geomspace(0.01, 3.0, 400)
"""Those that a scaling fit tries; neighbours are 1.4% apart."""


def scaling_fit(sizes: Sequence[float], losses: Sequence[float]) -> ScalingFit:
    """The power law of one arm by least squares in nats; form: Hoffmann et al. 2022, eq. 2, in one variable.

    Needs three different sizes. The exponent is searched between the ends of EXPONENTS; offset and factor,
    neither negative, are solved in closed form at each (variable projection).
    """
    x, y = np.asarray(sizes, dtype=float), np.asarray(losses, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"points: expected as many sizes as losses, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise ValueError("points: sizes must be positive and losses finite; leave diverged runs out")
    if len(np.unique(x)) < 3:
        raise ValueError("points: fewer than three different sizes; offset, scale and exponent need three")
    grid = EXPONENTS
    for _ in range(4):  # each time between the neighbours of the best
        offset, factor, exponent, rms = (values[0] for values in _power_laws(x, y[None], grid))
        best = int(np.searchsorted(grid, exponent))
        grid = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], len(EXPONENTS))
    return ScalingFit(
        float(offset), float(factor ** (1 / exponent) * _middle(x)), float(exponent), float(rms), len(x)
    )


def _middle(sizes: np.ndarray) -> float:
    return float(np.exp(np.log(sizes).mean()))


def _power_laws(x: np.ndarray, y: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, ...]:
    """(offset, factor, exponent, rms), each [R], of loss = offset + factor (x / middle)^-exponent.

    x [P] sizes; y [R, P] losses of R ladders over the same sizes; exponents [E] that are tried.
    """
    powers = (x / _middle(x)) ** -exponents[:, None]  # [E, P]
    centred = powers - powers.mean(axis=1, keepdims=True)
    factor = y @ centred.T / (centred**2).sum(axis=1)  # [R, E]
    offset = y.mean(axis=1, keepdims=True) - factor * powers.mean(axis=1)
    through_zero = y @ powers.T / (powers**2).sum(axis=1)
    factor = np.where(offset < 0, through_zero, factor)  # losses are positive, so this factor is too
    offset = np.where(offset < 0, 0.0, offset)
    offset = np.where(factor < 0, y.mean(axis=1, keepdims=True), offset)  # losses that do not fall
    factor = np.maximum(factor, 0.0)
    residual = y[:, None] - offset[..., None] - factor[..., None] * powers  # [R, E, P]
    rms = np.sqrt((residual**2).mean(axis=-1))
    best = rms.argmin(axis=1)
    rows = np.arange(len(y))
    return offset[rows, best], factor[rows, best], exponents[best], rms[rows, best]


@dataclass(frozen=True)
class Rung:
    """Two arms at one step of a ladder of sizes; the losses are paired by seed, nats/token."""

    size: float
    """Parameters of the arm."""
    other_size: float
    losses: Sequence[float]
    other_losses: Sequence[float]


@dataclass(frozen=True)
class SizeRatio:
    """How many times the other arm's parameters an arm needs for equal loss."""

    ratio: float | None
    """Geometric mean over the rungs; None where no ratio exists."""
    low: float | None
    high: float | None
    """95%, by bootstrap over seeds and sizes."""
    by_size: dict[str, float | None]
    """By the arm's parameters; None where the other arm's power law never reaches that loss."""
    fit: ScalingFit
    other_fit: ScalingFit
    too_short: str
    """Why nothing can be said; empty where the interval holds."""
    by_size_interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95%, over seeds alone; a size without one is left out."""
    exponents_interval: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Of the two laws, 95% over seeds alone, to the 1.4% of EXPONENTS."""
    crossing: float | None = None
    """The size, beyond the largest, from which the other arm's law is the lower."""
    crossing_interval: tuple[float, float] | None = None
    """95% over seeds alone; inf where the arm stays ahead to BEYOND times the largest size, the largest size
    where it is behind there already."""


def size_ratio(ladder: Sequence[Rung], resamples: int = 1000) -> SizeRatio:
    """The ratio of sizes at equal loss from a ladder of three rungs or more.

    At each rung the power law that is fitted to the other arm says how many times the size takes its own mean
    loss there to the arm's, so each arm has its own exponent, the ratio may change with size, and what the
    law misses of both losses cancels. The interval: seeds are drawn anew at each rung, in pairs, the law is
    fitted again, and the rungs that are averaged are drawn anew. Of few seeds such
    intervals are too narrow: three seeds drawn from three vary by 0.8 of what three new seeds do.

    `too_short` where there is one seed, where the other arm's losses fall over the ladder by less than four
    standard errors of a rung's mean, or where its law does not reach the arm's losses in 2.5% of the draws.
    """
    sizes = np.array([rung.size for rung in ladder], dtype=float)
    other_sizes = np.array([rung.other_size for rung in ladder], dtype=float)
    means = np.array([np.mean(rung.losses) for rung in ladder])
    others = np.array([np.mean(rung.other_losses) for rung in ladder])
    fit = scaling_fit(sizes.tolist(), means.tolist())
    other_fit = scaling_fit(other_sizes.tolist(), others.tolist())
    by_size = {
        f"{rung.size:.0f}": _ratio_of_sizes(rung, other_fit, float(mean), float(other))
        for rung, mean, other in zip(ladder, means, others, strict=True)
    }
    known = [value for value in by_size.values() if value is not None]
    ratio = math.exp(np.log(known).mean()) if len(known) == len(ladder) else None
    found = SizeRatio(ratio, None, None, by_size, fit, other_fit, "")
    if min(len(rung.losses) for rung in ladder) < 2:
        return replace(found, too_short="a size has fewer than 2 seeds")
    error = math.sqrt(np.mean([np.var(rung.other_losses, ddof=1) / len(rung.losses) for rung in ladder]))
    fall = float(others[other_sizes.argmin()] - others[other_sizes.argmax()])
    if fall <= 4 * error:
        return replace(found, too_short=f"losses fall by {fall:.3f} nats, seeds make {error:.3f} of noise")
    rng = np.random.default_rng(0)
    drawn_means, drawn_others = _drawn_losses(ladder, resamples, rng)
    laws = _power_laws(sizes, drawn_means, EXPONENTS)
    other_laws = _power_laws(other_sizes, drawn_others, EXPONENTS)
    found = replace(
        found,
        exponents_interval=(_middle_95(laws[2]), _middle_95(other_laws[2])),
        crossing=_finite(crossing_size(fit, other_fit, max(sizes))),
        crossing_interval=_middle_95(
            [
                crossing_size(one, other, max(sizes))
                for one, other in zip(_fits(sizes, laws), _fits(other_sizes, other_laws), strict=True)
            ]
        ),
    )
    offset, _, exponent, _ = (values[:, None] for values in other_laws)
    with np.errstate(divide="ignore", invalid="ignore"):
        farther = (np.log(drawn_others - offset) - np.log(drawn_means - offset)) / exponent
    # [resamples, rungs], not finite where the law does not reach a loss
    log_ratios = np.log(sizes / other_sizes) - farther
    rungs = rng.integers(len(ladder), size=log_ratios.shape)
    drawn = np.take_along_axis(log_ratios, rungs, axis=1).mean(axis=1)
    reached = np.isfinite(drawn)
    if ratio is None or reached.mean() < 0.975:
        return replace(found, too_short="the loss lies beyond what the other arm's power law reaches")
    low, high = np.exp(np.quantile(drawn[reached], [0.025, 0.975]))
    intervals = {
        size: _middle_95(np.exp(column))
        for size, column in zip(by_size, log_ratios.T, strict=True)
        if np.isfinite(column).all()
    }
    return replace(found, low=float(low), high=float(high), by_size_interval=intervals)


def _ratio_of_sizes(rung: Rung, law: ScalingFit, loss: float, other: float) -> float | None:
    """The arm's size over the one that the other arm needs for `loss`; None where its law never has that."""
    here, there = law.size(other), law.size(loss)
    if not 0 < here < math.inf or not 0 < there / here < math.inf:  # a flat law's sizes go out of range
        return None
    return rung.size / rung.other_size / (there / here)


def _drawn_losses(
    ladder: Sequence[Rung], resamples: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses of both arms, [resamples, rungs], over seeds drawn anew at each rung, in pairs."""
    own, other = np.empty((2, resamples, len(ladder)))
    for place, rung in enumerate(ladder):
        seeds = rng.integers(len(rung.losses), size=(resamples, len(rung.losses)))
        own[:, place] = np.asarray(rung.losses)[seeds].mean(axis=1)
        other[:, place] = np.asarray(rung.other_losses)[seeds].mean(axis=1)
    return own, other


def _fits(sizes: np.ndarray, laws: tuple[np.ndarray, ...]) -> Iterator[ScalingFit]:
    for offset, factor, exponent, rms in zip(*laws, strict=True):
        scale = factor ** (1 / exponent) * _middle(sizes)
        yield ScalingFit(float(offset), float(scale), float(exponent), float(rms), len(sizes))


def _middle_95(values: Iterable[float]) -> tuple[float, float]:
    """Between the 2.5% and the 97.5% quantile; inf has its place among the values."""
    low, high = np.quantile(list(values), [0.025, 0.975], method="nearest")
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


BEYOND = 1000
"""How many times the largest size laws are followed."""


def crossing_size(law: ScalingFit, other: ScalingFit, largest: float) -> float:
    """The size from `largest` on at which `other` is the lower: `largest` where it is so there, inf where it
    is not to BEYOND times that.
    """
    sizes = np.geomspace(largest, BEYOND * largest, 2000)
    own_loss, other_loss = (one.irreducible + (one.scale / sizes) ** one.exponent for one in (law, other))
    ahead = own_loss < other_loss
    return math.inf if ahead.all() else float(sizes[ahead.argmin()])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Of the median, from order statistics (David & Nagaraja 2003, sec. 7.1); at least `confidence` for six
    values or more, fewer give their whole range.
    """
    ordered = sorted(values)
    n = len(ordered)
    skipped = max(0, int(stats.binom.ppf((1 - confidence) / 2, n, 0.5)) - 1)
    return ordered[skipped], ordered[n - 1 - skipped]


def standard_error(nll_nats: Sequence[float], tokens: Sequence[float]) -> float:
    """Sampling error of sum(nll) / sum(tokens), nats/token, from parts of a text taken as independent.

    Linearised ratio estimator (Cochran 1977, eq. 2.46): what another text of the same kind and length would
    change.
    """
    nll, counts = np.asarray(nll_nats, dtype=float), np.asarray(tokens, dtype=float)
    if nll.ndim != 1 or nll.shape != counts.shape or len(nll) < 2:
        raise ValueError(
            f"parts: expected as many sums as counts, 2 or more, got {nll.shape}, {counts.shape}"
        )
    residual = nll - nll.sum() / counts.sum() * counts
    return float(math.sqrt(len(nll) / (len(nll) - 1) * (residual**2).sum()) / counts.sum())
