import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kanlm import stats


def test_paired_interval_of_a_textbook_case():
    # Differences 1, 2, 3: mean 2, deviation 1. t with 2 degrees has quantile (2p-1)/sqrt(2p(1-p)).
    difference = stats.paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert difference.mean == 2.0 and difference.std == 1.0 and difference.pairs == 3
    assert difference.low == pytest.approx(2 - half, rel=1e-12)
    assert difference.high == pytest.approx(2 + half, rel=1e-12)


def test_paired_interval_agrees_with_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=7), rng.normal(size=7)
    ours, theirs = stats.paired_difference(a, b, confidence=0.9), scipy_stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.9)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-12)


def test_pairing_removes_what_the_seeds_share():
    seeds = np.array([3.1, 3.4, 2.9, 3.2])
    noise = np.array([1e-3, -1e-3, 2e-3, -2e-3])
    difference = stats.paired_difference(seeds + 0.05 + noise, seeds)
    assert 0.04 < difference.low < 0.05 < difference.high < 0.06


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        a, b = rng.normal(0.3, 1, size=5), rng.normal(0, 1, size=5)
        difference = stats.paired_difference(a, b)
        hits += difference.low < 0.3 < difference.high
    assert 930 <= hits <= 970


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    rng = np.random.default_rng(2)
    verdicts = set()
    for _ in range(200):
        b = rng.normal(3, 0.1, size=4)
        a = b + rng.normal(0.004, 0.006, size=4)
        result = stats.equivalence(a, b, margin=0.01)
        assert result.equivalent == (-0.01 < result.low and result.high < 0.01)
        verdicts.add(result.equivalent)
    assert verdicts == {True, False}


def test_equivalence_p_value_is_the_larger_of_two_one_sided_tests():
    a, b = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.004, 1.999, 3.002, 4.998])
    result = stats.equivalence(a, b, margin=0.01)
    above = scipy_stats.ttest_1samp(a - b, -0.01, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(a - b, 0.01, alternative="less").pvalue
    assert result.p_value == pytest.approx(max(above, below), rel=1e-12)


def test_identical_runs_are_equivalent_and_a_constant_gap_is_not():
    runs = [3.0, 3.25, 3.5]
    assert stats.equivalence(runs, runs).equivalent
    assert not stats.equivalence([run + 0.25 for run in runs], runs).equivalent
    assert stats.paired_difference(runs, runs).p_value == 1.0
    assert stats.paired_difference([run + 0.25 for run in runs], runs).p_value == 0.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0], [2.0], "at least 2 seeds"),
        ([1.0, 2.0], [1.0], "equal length"),
        ([1.0, math.nan], [1.0, 2.0], "diverged"),
        ([1.0, math.inf], [1.0, 2.0], "diverged"),
    ],
)
def test_pairs_that_cannot_be_judged_are_errors(a, b, message):
    with pytest.raises(ValueError, match=message):
        stats.paired_difference(a, b)
    with pytest.raises(ValueError, match=message):
        stats.equivalence(a, b)


def test_levels_out_of_range_are_errors():
    with pytest.raises(ValueError, match="confidence"):
        stats.paired_difference([1, 2], [3, 4], confidence=1.0)
    with pytest.raises(ValueError, match="margin"):
        stats.equivalence([1, 2], [3, 4], margin=0.0)
    with pytest.raises(ValueError, match="alpha"):
        stats.equivalence([1, 2], [3, 4], alpha=0.5)


def test_scaling_fit_recovers_a_known_law():
    sizes = np.geomspace(1e5, 1e9, 6)
    fit = stats.scaling_fit(sizes, 1.69 + (3e5 / sizes) ** 0.34)
    assert fit.irreducible == pytest.approx(1.69, abs=1e-5)
    assert fit.exponent == pytest.approx(0.34, rel=1e-5)
    assert fit.scale == pytest.approx(3e5, rel=1e-4)
    assert fit.rms < 1e-6
    assert fit.loss(fit.size(2.5)) == pytest.approx(2.5, rel=1e-12)
    assert fit.size(1.6) == math.inf


def ladder(offset=0.0, falls=True, noise=1e-3, seeds=3, factor=1.0, rng_seed=0):
    """Rungs of an arm that needs `factor` times the other's parameters, with noise over seeds."""
    rng = np.random.default_rng(rng_seed)
    rungs = []
    for size in (1e5, 2e5, 4e5, 8e5, 1.6e6):
        shared = rng.normal(0, 3 * noise, seeds)
        own = 2.0 + (3e5 * factor / size) ** 0.4 if falls else 3.0
        other = 2.0 + (3e5 / size) ** 0.4 if falls else 3.0
        rungs.append(
            stats.Rung(
                size,
                size,
                own + offset + shared + rng.normal(0, noise, seeds),
                other + shared + rng.normal(0, noise, seeds),
            )
        )
    return rungs


def test_the_ratio_of_sizes_at_equal_loss_is_recovered_with_its_interval():
    for factor in (0.5, 1.0, 3.0):
        found = stats.size_ratio(ladder(factor=factor))
        assert found.ratio == pytest.approx(factor, rel=0.05) and not found.too_short
        assert found.low < factor < found.high and found.high / found.low < 1.5
        assert len(found.by_size) == 5 and found.fit.exponent == pytest.approx(0.4, rel=0.3)


def test_what_a_law_misses_of_both_arms_cancels():
    rungs = ladder(factor=0.9, noise=1e-4)
    bent = [
        stats.Rung(r.size, r.other_size, r.losses + miss, r.other_losses + miss)
        for r, miss in zip(rungs, (0.02, -0.03, 0.03, -0.02, 0.0), strict=True)
    ]
    for found in (stats.size_ratio(rungs), stats.size_ratio(bent)):
        assert list(found.by_size.values()) == pytest.approx([0.9] * 5, abs=0.03)


def test_a_crossover_is_seen_by_size():
    rungs = [
        stats.Rung(r.size, r.other_size, r.losses + 0.03 * math.log2(r.size / 4e5), r.other_losses)
        for r in ladder(noise=1e-3)
    ]
    found = stats.size_ratio(rungs)
    ratios = list(found.by_size.values())
    assert ratios == sorted(ratios) and ratios[0] < 0.95 and ratios[-1] > 1.05
    assert all(low <= found.by_size[size] <= high for size, (low, high) in found.by_size_interval.items())
    assert len(found.by_size_interval) == 5
    assert found.crossing == 1.6e6 and found.crossing_interval == (1.6e6, 1.6e6)  # behind there already


def test_laws_that_cross_beyond_the_sizes_are_said():
    law = stats.ScalingFit(2.0, 1e5, 0.5, 0.0, 4)
    lower_floor = stats.ScalingFit(1.9, 2e5, 0.5, 0.0, 4)  # 2 + (1e5 / N)^0.5 = 1.9 + (2e5 / N)^0.5
    expected = 1e5 * ((2**0.5 - 1) / 0.1) ** 2
    assert stats.crossing_size(law, lower_floor, 1e6) == pytest.approx(expected, rel=0.01)
    assert stats.crossing_size(law, lower_floor, 1e7) == 1e7  # behind at the largest size already
    assert stats.crossing_size(law, stats.ScalingFit(2.1, 1e5, 0.5, 0.0, 4), 1e6) == math.inf


def test_the_interval_of_a_crossing_and_of_an_exponent_hold_the_truth():
    """Laws with floors 2.00 and 1.98 that cross at 1e7, from sizes to 1.6e6."""
    crossing, covered, exponents = 1e7, 0, 0
    scale = (0.02 + (3e5 / crossing) ** 0.4) ** 2.5 * crossing
    for rng_seed in range(30):
        rungs = ladder(noise=2e-3, seeds=8, rng_seed=rng_seed)
        rungs = [
            stats.Rung(
                r.size,
                r.size,
                r.losses,
                r.other_losses - 0.02 + (scale / r.size) ** 0.4 - (3e5 / r.size) ** 0.4,
            )
            for r in rungs
        ]
        found = stats.size_ratio(rungs, resamples=200)
        low, high = found.crossing_interval
        covered += low <= crossing <= high
        (low, high), _ = found.exponents_interval
        exponents += low <= 0.4 <= high
    assert covered >= 24 and exponents >= 24


@pytest.mark.parametrize(
    ("rungs", "words"),
    [
        (ladder(seeds=1), "fewer than 2 seeds"),
        (ladder(falls=False), "seeds make"),
        (ladder(offset=-0.8), "beyond what the other arm"),
    ],
)
def test_a_ladder_that_is_too_short_to_say_says_so(rungs, words):
    found = stats.size_ratio(rungs)
    assert words in found.too_short and found.low is None


def test_pure_noise_never_finds_a_ratio_of_a_hundred():
    for rng_seed in range(40):
        found = stats.size_ratio(ladder(falls=False, noise=0.02, rng_seed=rng_seed), resamples=200)
        assert found.too_short or not (found.high < 1 / 10 or found.low > 10)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    # With 9 values the second and the eighth: 1 - 2 (1 + 9) / 2^9 = 96.1%; the third would give 82%.
    assert stats.median_interval(list(range(9))) == (1, 7)
    assert stats.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    rng = np.random.default_rng(2)
    intervals = [stats.median_interval(values.tolist()) for values in rng.exponential(size=(2000, 15))]
    assert 0.95 < np.mean([low < math.log(2) < high for low, high in intervals]) < 0.98


def test_sampling_error_is_the_spread_over_texts():
    rng = np.random.default_rng(8)
    tokens = rng.integers(50, 150, (400, 60))
    nll = 3.0 * tokens + rng.normal(0, 1, tokens.shape) * tokens**0.5
    errors = [stats.standard_error(a, b) for a, b in zip(nll, tokens, strict=True)]
    assert np.mean(errors) == pytest.approx((nll.sum(1) / tokens.sum(1)).std(), rel=0.1)
    with pytest.raises(ValueError, match="2 or more"):
        stats.standard_error([1.0], [1])


def test_a_law_without_offset_keeps_the_offset_at_zero():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    fit = stats.scaling_fit(sizes, 5.0 * sizes**-0.2)
    assert fit.irreducible == pytest.approx(0.0, abs=1e-4)
    assert fit.exponent == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (([], []), "as many sizes as losses"),
        (([1e5, 1e6], [3.0, 2.0]), "three different sizes"),
        (([1e5, 1e6, 1e7], [3.0, 2.0]), "as many sizes as losses"),
        (([1e5, 1e6, 1e7], [3.0, 2.0, math.nan]), "diverged"),
        (([0.0, 1e6, 1e7], [3.0, 2.0, 1.5]), "positive"),
    ],
)
def test_points_without_a_law_are_errors(points, message):
    with pytest.raises(ValueError, match=message):
        stats.scaling_fit(*points)


def test_holm_is_that_of_a_worked_example():
    # Holm 1979's procedure by hand: 4 x 0.005, 3 x 0.01, max(2 x 0.03, before), max(0.04, before).
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6]) == [0.6] and stats.holm([]) == [] and stats.holm([0.7, 0.6]) == [1.0, 1.0]


def test_sign_flips_are_counted_exactly():
    # All of one sign: two of the 2^n assignments are as extreme.
    for n in (3, 5, 8):
        ones = np.arange(1, n + 1, dtype=float)
        assert stats.sign_flip_p_value(ones, np.zeros(n)) == pytest.approx(2 / 2**n)
    # Differences 1, 2, -4: sums of the 8 signs are +-7, +-5, +-3, +-1; |-1| or more: all.
    assert stats.sign_flip_p_value([1.0, 2.0, -4.0], [0.0, 0.0, 0.0]) == 1.0
    # 3, 2, -1: +-6, +-4, +-2, 0, 0; |4| or more: four of eight.
    assert stats.sign_flip_p_value([3.0, 2.0, -1.0], [0.0, 0.0, 0.0]) == pytest.approx(0.5)


def test_bootstrap_interval_agrees_with_scipy():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 1, 12), rng.normal(0, 1, 12)
    found = scipy_stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=20_000, random_state=1)
    low, high = stats.bootstrap_interval(a, b)
    assert (low, high) == pytest.approx(tuple(found.confidence_interval), abs=0.05)
    assert stats.bootstrap_interval(a, b) == (low, high), "the same pairs, the same interval"


def test_detectable_difference_is_that_of_the_power_tables():
    # G*Power 3.1, two-sided paired t test at 5%: d = 1 has power 0.803 with 10 pairs, d = 0.5 0.808 with 34.
    assert stats.detectable_difference(1.0, 10, power=0.8031) == pytest.approx(1.0, abs=2e-3)
    assert stats.detectable_difference(2.0, 34, power=0.8078) == pytest.approx(1.0, abs=2e-3)


def test_detectable_difference_is_found_as_often_as_it_says():
    rng = np.random.default_rng(6)
    shift = stats.detectable_difference(0.02, 4)
    differences = rng.normal(shift, 0.02, (4000, 4))
    p_values = scipy_stats.ttest_1samp(differences, 0, axis=1).pvalue
    assert 0.78 < (p_values < 0.05).mean() < 0.82


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.02, 1), "2 seeds"), ((math.nan, 3), "std"), ((0.02, 3, 0.05, 0.01), "power")],
)
def test_power_of_nothing_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        stats.detectable_difference(*arguments)
