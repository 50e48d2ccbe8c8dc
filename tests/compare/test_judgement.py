"""The judgement from losses alone: synthetic arms whose right verdict is known."""

import math

import numpy as np
import pytest

from kanlm import stats
from kanlm.compare.judgement import ArmLosses, best_baseline, judge, sentence
from kanlm.config import UserError

SEEDS = range(5)


def arm(name, family, mean, spread=0.002, seeds=SEEDS, diverged=(), rng_seed=0, validation=None) -> ArmLosses:
    """Losses of an arm: `mean`, what a seed does to all arms, and noise of its own."""
    rng = np.random.default_rng([rng_seed, *name.encode()])
    shared = {seed: np.random.default_rng(seed).normal(0, 0.05) for seed in range(40)}
    test = {seed: mean + shared[seed] + rng.normal(0, spread) for seed in seeds if seed not in diverged}
    own = mean if validation is None else validation
    chosen = {seed: own + shared[seed] + rng.normal(0, spread) for seed in test}
    bits = {seed: loss / 2.5 for seed, loss in test.items()}
    return ArmLosses(name, family, chosen, test, frozenset(diverged), bits)


def verdict(*arms, **more):
    (first, *_) = judge(arms, **more)
    return first, sentence(first)


@pytest.mark.parametrize(
    ("mean", "spread", "outcome", "words"),
    [
        (3.27, 0.002, "better", "the KAN k predicted unseen text better than the MLP gelu"),
        (3.33, 0.002, "worse", "the KAN k predicted unseen text worse than the MLP gelu"),
        (3.30, 0.002, "tie", "the KAN k and the MLP gelu predicted unseen text equally well"),
        (3.29, 0.060, "undecided", "no larger than chance makes it (one of 0."),
    ],
)
def test_known_differences_get_the_right_sentence(mean, spread, outcome, words):
    judged, text = verdict(arm("gelu", "mlp", 3.3, spread), arm("k", "kan", mean, spread))
    assert judged.outcome == outcome and words in text
    low, high = judged.interval_nats
    assert (
        low < judged.difference_nats < high
        and low < judged.bootstrap_nats[0] < judged.bootstrap_nats[1] < high
    )


def test_the_baseline_is_chosen_on_the_validation_text():
    """It is the one that did better there, though the test text prefers the other."""
    gelu, swiglu = arm("gelu", "mlp", 3.30, validation=3.20), arm("swiglu", "mlp", 3.28, validation=3.25)
    judged, _ = verdict(gelu, swiglu, arm("k", "kan", 3.29))
    assert judged.baseline == "gelu" and judged.outcome == "better"


def test_a_diverged_seed_does_not_remove_the_best_baseline():
    """Nor does the seed that it lost, an easy or a hard one, move its place."""
    for lost in SEEDS:
        best = arm("gelu", "mlp", 3.30, diverged=(lost,))
        assert best_baseline([best, arm("swiglu", "mlp", 3.32), arm("geglu", "mlp", 3.33)]) == "gelu"


def test_a_diverged_seed_counts_against_its_arm_and_is_named():
    gelu = arm("gelu", "mlp", 3.3)
    judged, text = verdict(gelu, arm("k", "kan", 3.2, diverged=(1, 3)))
    assert judged.outcome == "undecided" and judged.seeds == 3 and judged.diverged == (1, 3)
    assert "an arm that diverges is not the better one; k diverged in seeds 1 and 3." in text
    judged, text = verdict(gelu, arm("k", "kan", 3.3, diverged=(2,)))
    assert judged.outcome == "undecided" and text.endswith("k diverged in seed 2.")
    judged, text = verdict(gelu, arm("k", "kan", 3.4, diverged=(2,)))
    assert judged.outcome == "worse" and text.endswith("; k diverged in seed 2.")


def test_a_diverged_baseline_counts_against_the_baseline():
    judged, text = verdict(arm("gelu", "mlp", 3.3, diverged=(0,)), arm("k", "kan", 3.2))
    assert judged.outcome == "better" and text.endswith("; gelu diverged in seed 0.")
    judged, text = verdict(arm("gelu", "mlp", 3.3, diverged=(0,)), arm("k", "kan", 3.4))
    assert judged.outcome == "undecided" and "a baseline that diverges is not the better one" in text


def test_an_arm_that_always_diverges_did_worse():
    judged, text = verdict(arm("gelu", "mlp", 3.3), arm("k", "kan", 3.2, diverged=tuple(SEEDS)))
    assert judged.outcome == "worse" and judged.difference_nats is None
    assert "did worse than the MLP gelu: it never finished, it diverged in seeds 0, 1, 2, 3 and 4." in text


def test_a_control_is_not_called_a_kan():
    judged, text = verdict(arm("gelu", "mlp", 3.3), arm("xielu", "control", 3.2))
    assert judged.family == "control" and "the control xielu predicted" in text and "KAN" not in text


def test_one_seed_is_no_verdict_and_the_rule_is_named():
    judged, text = verdict(arm("gelu", "mlp", 3.3, seeds=(0,)), arm("k", "kan", 3.0, seeds=(0,)))
    assert judged.outcome == "undecided" and judged.interval_nats is None
    assert text.startswith("No verdict: ") and "a verdict needs at least 2 seeds" in text


def test_without_a_finished_mlp_there_is_no_verdict():
    judged, text = verdict(arm("k", "kan", 3.0))
    assert judged.outcome == "no result" and text == "No verdict: no MLP arm finished."


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_finished_loss_that_is_no_number_is_an_error_with_a_name(bad):
    with pytest.raises(UserError, match=r"k, seed 3: the test loss of a finished run is (nan|inf)"):
        ArmLosses("k", "kan", {}, {3: bad})


def test_marks_that_contradict_each_other_are_errors():
    with pytest.raises(UserError, match="k, seed 1: marked as diverged, but it has a test loss"):
        ArmLosses("k", "kan", {}, {1: 3.0}, {1})
    with pytest.raises(UserError, match="gelu, seed 0: no validation loss"):
        judge([ArmLosses("gelu", "mlp", {}, {0: 3.0})])
    with pytest.raises(UserError, match="two have one name"):
        judge([arm("k", "kan", 3.0), arm("k", "kan", 3.1)])


def test_holm_adjusts_over_the_arms_judged_and_intervals_agree_with_it():
    rng = np.random.default_rng(5)
    outcomes = set()
    for trial in range(60):
        means = rng.normal(3.3, 0.006, 3)
        kans = [arm(f"k{i}", "kan", mean, 0.004, rng_seed=trial) for i, mean in enumerate(means)]
        judged = judge([arm("gelu", "mlp", 3.3, 0.004, rng_seed=trial), *kans], margin=1e-6)
        ordered = sorted(row.p_value for row in judged)
        assert min(row.p_holm for row in judged) == pytest.approx(min(1, 3 * ordered[0]))
        for row in judged:
            low, high = row.interval_nats
            assert (row.p_holm <= 0.05) == (low > 0 or high < 0)
            outcomes.add(row.outcome)
    assert {"better", "worse", "undecided"} <= outcomes


def test_the_best_of_five_equal_mlps_owes_its_place_to_luck(monkeypatch):
    """An equal KAN is called worse in at most about 2.5%, also where luck is in both losses."""
    monkeypatch.setattr(stats, "bootstrap_interval", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(stats, "sign_flip_p_value", lambda *_: 1.0)
    monkeypatch.setattr(stats, "detectable_difference", lambda *_: 0.0)
    rng = np.random.default_rng(11)
    wrong = 0
    for _ in range(300):
        losses = 3.3 + rng.normal(0, 0.02, (6, 5))
        arms = [
            ArmLosses(
                f"mlp{i}" if i else "k", "mlp" if i else "kan", dict(enumerate(row)), dict(enumerate(row))
            )
            for i, row in enumerate(losses)
        ]
        wrong += judge(arms, margin=1e-6)[0].outcome == "worse"
    assert 1 <= wrong <= 14  # 2.5% of 300 is 7.5
