"""The judgement of a comparison, from losses alone: who predicted unseen text better, by rules fixed before
the numbers are seen. Needs no folder, no torch and no model.

    judged = judge([
        ArmLosses("gelu", "mlp", validation={0: 3.31, 1: 3.29}, test={0: 3.35, 1: 3.33}),
        ArmLosses("kan_act", "kan", validation={0: 3.29, 1: 3.28}, test={0: 3.33, 1: 3.32}, diverged={2}),
    ])
    print(sentence(judged[0]))

The baseline is the MLP with the lowest mean loss on the validation text; the test text never chooses. For an
arm, d_s = loss(arm, seed s) - loss(baseline, seed s) on the test text, in nats/token, over the seeds that
both finished. The first rule that fits gives the outcome:

    1  no MLP finished a seed, or no seed is common    "no result"
    2  the arm diverged in every seed, the baseline
       finished two or more of them                     "worse"
    3  the arm or the baseline is worse than all that
       needs no neural network, even counting of three
       letters                                          "learned nothing"
    4  fewer than 2 common seeds                        "undecided": one run cannot tell skill from luck
    5  90% interval of the mean of d within +-margin    "tie" (two one-sided tests at 5%)
    6  Holm-adjusted p of d at most 5%, d < 0           "better"
    7  the same with d > 0                              "worse"
    8  else                                             "undecided"

A seed in which only the arm diverged counts against it: such an arm is never "better" and never a "tie". A
seed in which only the baseline diverged counts against the baseline in the same way: the arm is then never
"worse". Both are named in the sentence, and neither makes an arm drop out.

Holm adjusts over the arms of one family (KANs, controls). The interval of an arm has the level at which
Holm's procedure tested it, so that it excludes 0 exactly where rule 6 or 7 finds p small enough.

The best of several MLPs owes a part of its place to luck, and that luck is in its test loss too, since it is
the same model. So "worse" must hold at a level that is divided by the number of contenders: the MLPs that the
validation text cannot tell from the best. Among 5 equal MLPs an equal KAN is then called worse in at most
about 2.5% of comparisons, as meant. "Better" needs no such care: luck of the baseline is against it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np

from kanlm.config import UserError
from kanlm.stats import MARGIN_NATS, Evidence, family_evidence, paired_difference, standard_error

Family = Literal["kan", "mlp", "control"]
Outcome = Literal["better", "worse", "tie", "undecided", "learned nothing", "no result"]
ALPHA = 0.05
"""Of the two-sided test, over all arms of a family together."""

MATCHED = {
    "parameters": "With equally many parameters",
    "flops": "With equal computation for each token",
    "wallclock": "With equal training time",
}
KIND = {"kan": "the KAN", "control": "the control", "mlp": "the MLP"}


@dataclass(frozen=True)
class ArmLosses:
    """What one arm reached at one size and matching, nats/token by seed, each from the final step."""

    name: str
    family: Family
    validation: Mapping[int, float]
    """Chooses the baseline; needed for MLPs alone."""
    test: Mapping[int, float]
    """Decides; of finished seeds."""
    diverged: Collection[int] = ()
    """Seeds that ended because their loss was no number or ran away."""
    bits_per_byte: Mapping[int, float] = field(default_factory=dict)
    """On the test text, for the sentence; may be left out."""
    parts: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """(tokens, nll in nats) of consecutive parts of the test text, for its sampling error."""

    def __post_init__(self) -> None:
        for text, losses in (("validation", self.validation), ("test", self.test)):
            for seed, loss in losses.items():
                if not math.isfinite(loss):
                    raise UserError(
                        f"{self.name}, seed {seed}: the {text} loss of a finished run is {loss}; find out "
                        "why, or mark the seed as diverged"
                    )
        both = sorted(set(self.test) & set(self.diverged))
        if both:
            raise UserError(f"{self.name}, seed {both[0]}: marked as diverged, but it has a test loss")


@dataclass(frozen=True)
class Judgement:
    """One KAN (or control) arm against the best MLP at one matching and size."""

    matching: str
    size: str
    arm: str
    family: Family
    baseline: str | None
    outcome: Outcome
    seeds: int
    """That both finished."""
    arm_bits_per_byte: float | None = None
    baseline_bits_per_byte: float | None = None
    arm_nats: float | None = None
    baseline_nats: float | None = None
    difference_nats: float | None = None
    """Mean of loss(arm) - loss(baseline), nats/token; negative = the arm is better."""
    interval_nats: tuple[float, float] | None = None
    """Student's, of paired differences, with `confidence`."""
    confidence: float | None = None
    bootstrap_nats: tuple[float, float] | None = None
    """Percentile interval over resampled seeds, with the same confidence."""
    p_value: float | None = None
    p_holm: float | None = None
    p_sign_flip: float | None = None
    tie_interval_nats: tuple[float, float] | None = None
    """90%: a tie where it lies within +-margin."""
    p_tie: float | None = None
    std_nats: float | None = None
    """Of the paired differences over seeds."""
    detectable_nats: float | None = None
    """The smallest true difference that these seeds find in 80% of comparisons."""
    text_error_nats: float | None = None
    """Sampling error of the difference: what another test text of this kind and length would change."""
    diverged: tuple[int, ...] = ()
    """Seeds in which the arm diverged."""
    baseline_diverged: tuple[int, ...] = ()
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def learned_nothing(bits_per_byte: float, baselines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a model is beaten by everything that needs no neural network, also by the weakest n-gram order.

    A model that beats the weak orders and not the best has learned something: it is judged, and the sentence
    says that counting predicts better.
    """
    known = [bits for row in baselines for bits in (row["bits_per_byte"], *row.get("orders", {}).values())]
    return bool(known) and bits_per_byte >= max(known)


def best_baseline(arms: Sequence[ArmLosses]) -> str | None:
    """The MLP with the lowest loss on the validation text; None where no MLP finished.

    Seeds differ, so an MLP that lost one is compared on equal terms: losses are arm + seed, least squares.
    """
    mlps = [arm for arm in arms if arm.family == "mlp"]
    rows = [(number, seed, loss) for number, arm in enumerate(mlps) for seed, loss in arm.validation.items()]
    if not rows:
        return None
    there = sorted({number for number, _, _ in rows})
    seeds = sorted({seed for _, seed, _ in rows})
    columns = np.zeros((len(rows), len(there) + len(seeds)))
    for line, (number, seed, _) in enumerate(rows):
        columns[line, there.index(number)] = columns[line, len(there) + seeds.index(seed)] = 1.0
    # Of the solutions that differ by a shift from seeds to arms lstsq takes the shortest; the order is one.
    effects = np.linalg.lstsq(columns, np.array([loss for _, _, loss in rows]), rcond=None)[0]
    return mlps[there[int(np.argmin(effects[: len(there)]))]].name


def judge(
    arms: Sequence[ArmLosses],
    margin: float = MARGIN_NATS,
    *,
    matching: str = "parameters",
    size: str = "base",
    learned_nothing: Collection[str] = (),
    broken_rule: str = "",
) -> list[Judgement]:
    """A judgement for each arm that is no MLP, by the rules of this module.

    broken_rule: what makes the arms incomparable; nothing is judged then, and the sentence names it.
    Order: KANs, then controls; within a family the best on the test text first. UserError for a loss that is
    no number, and for an MLP that finished a seed without a validation loss.
    """
    by_name = {arm.name: arm for arm in arms}
    if len(by_name) < len(arms):
        raise UserError("arms: two have one name; every arm needs its own")
    for arm in arms:
        unchosen = sorted(set(arm.test) - set(arm.validation)) if arm.family == "mlp" else []
        if unchosen:
            raise UserError(
                f"{arm.name}, seed {unchosen[0]}: no validation loss; the baseline is chosen by it, never by "
                "the test text"
            )
    baseline = by_name.get(best_baseline(arms) or "")
    families = [[arm for arm in arms if arm.family == family] for family in ("kan", "control")]
    if baseline is None:
        blank = [_numbers(arm, None, matching, size) for own in families for arm in own]
        return [
            replace(one, outcome="no result", reason=broken_rule or "no MLP arm finished") for one in blank
        ]

    pairs = {arm.name: paired_losses(arm.test, baseline.test) for own in families for arm in own}
    gaps = {arm.name: text_gaps(arm, baseline) for own in families for arm in own}
    text_errors = {name: standard_error(*gap) for name, gap in gaps.items() if gap}
    evidence: dict[str, Evidence] = {}
    for own in families:
        tested = [arm.name for arm in own if len(pairs[arm.name][0]) > 1]
        found = family_evidence([pairs[name] for name in tested], margin, ALPHA)
        evidence |= dict(zip(tested, found, strict=True))

    judged: list[Judgement] = []
    rivals = contenders(arms, baseline)
    for own in families:
        decided = []
        for arm in own:
            numbers = _numbers(
                arm, baseline, matching, size, evidence.get(arm.name), text_errors.get(arm.name)
            )
            outcome, reason = _outcome(numbers, arm, baseline, rivals, learned_nothing)
            if broken_rule:
                outcome, reason = "no result", broken_rule
            decided.append(replace(numbers, outcome=outcome, reason=reason))
        judged += sorted(decided, key=lambda judgement: judgement.arm_nats or math.inf)
    return judged


def paired_losses(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """The losses of the seeds that both have, in the seeds' order."""
    seeds = sorted(set(a) & set(b))
    return [a[seed] for seed in seeds], [b[seed] for seed in seeds]


def text_gaps(arm: ArmLosses, baseline: ArmLosses) -> tuple[list[float], list[int]] | None:
    """NLL of the arm less that of the baseline in each part of the test text, mean over the seeds that both
    finished, and the parts' tokens; None where the losses come without parts.
    """
    seeds = sorted(set(arm.test) & set(baseline.test))
    own, other = ([losses.parts.get(seed, ()) for seed in seeds] for losses in (arm, baseline))
    parts = [*own, *other]
    if not parts or len({len(one) for one in parts}) > 1 or len(parts[0]) < 2:
        return None
    nll, other_nll = (np.array([[nll for _, nll in one] for one in rows]) for rows in (own, other))
    return (nll - other_nll).mean(axis=0).tolist(), [tokens for tokens, _ in parts[0]]


def contenders(arms: Sequence[ArmLosses], baseline: ArmLosses) -> int:
    """MLPs, the baseline among them, that the validation text does not tell from it (paired t test at 5%)."""
    count = 1
    for arm in arms:
        if arm.family != "mlp" or arm.name == baseline.name:
            continue
        own, other = paired_losses(arm.validation, baseline.validation)
        if len(own) < 2:
            count += bool(own)
            continue
        count += paired_difference(own, other).low <= 0
    return count


def _numbers(
    arm: ArmLosses,
    baseline: ArmLosses | None,
    matching: str,
    size: str,
    found: Evidence | None = None,
    text_error_nats: float | None = None,
) -> Judgement:
    """The numbers of `arm` against `baseline`; nothing is decided yet."""
    blank = Judgement(matching, size, arm.name, arm.family, None, "undecided", len(arm.test))
    if baseline is None:
        return blank
    seeds = sorted(set(arm.test) & set(baseline.test))
    numbers = replace(
        blank,
        baseline=baseline.name,
        seeds=len(seeds),
        diverged=tuple(sorted(arm.diverged)),
        baseline_diverged=tuple(sorted(baseline.diverged)),
        text_error_nats=text_error_nats,
    )
    if not seeds:
        return numbers
    nats = [fmean(losses.test[seed] for seed in seeds) for losses in (arm, baseline)]
    bits = [
        fmean(losses.bits_per_byte[seed] for seed in seeds)
        if set(seeds) <= set(losses.bits_per_byte)
        else None
        for losses in (arm, baseline)
    ]
    numbers = replace(
        numbers,
        arm_bits_per_byte=bits[0],
        baseline_bits_per_byte=bits[1],
        arm_nats=nats[0],
        baseline_nats=nats[1],
        difference_nats=nats[0] - nats[1],
    )
    if found is None:
        return numbers
    # Kept whatever the outcome: a reader may ask what the seeds say where the rules give no verdict.
    return replace(
        numbers,
        interval_nats=found.interval,
        confidence=found.confidence,
        bootstrap_nats=found.bootstrap,
        p_value=found.p_value,
        p_holm=found.p_holm,
        p_sign_flip=found.p_sign_flip,
        tie_interval_nats=found.tie_interval,
        p_tie=found.p_tie,
        std_nats=found.std,
        detectable_nats=found.detectable,
    )


def _outcome(
    numbers: Judgement, arm: ArmLosses, baseline: ArmLosses, rivals: int, idle: Collection[str]
) -> tuple[Outcome, str]:
    """The outcome and its reason, by the rules in their order; `rivals`: the `contenders`."""
    lost = sorted(set(arm.diverged) & set(baseline.test))
    baseline_lost = sorted(set(baseline.diverged) & set(arm.test))
    if not numbers.seeds:
        if len(lost) >= 2 and not arm.test:
            return "worse", "diverged"
        return "no result", f"{arm.name} finished no seed with {baseline.name}"
    if nothing := [name for name in (arm.name, baseline.name) if name in idle]:
        return "learned nothing", " and ".join(nothing)
    if numbers.p_tie is None or numbers.p_holm is None or numbers.difference_nats is None:
        return "undecided", "one seed; an interval needs at least 2"
    if numbers.p_tie < ALPHA and not lost and not baseline_lost:
        return "tie", ""
    if numbers.p_holm > ALPHA:
        return "undecided", "the interval holds zero"
    if numbers.difference_nats < 0:
        if lost:
            return "undecided", "ahead, but diverged seeds count against it"
        return "better", ""
    if baseline_lost:
        return "undecided", "behind, but the baseline diverged in seeds"
    if numbers.p_holm * rivals > ALPHA:
        return "undecided", "behind, but by the luck of the best of several"
    return "worse", ""


def seeds_text(seeds: Sequence[int]) -> str:
    """ "seed 1", "seeds 1 and 3", "seeds 1, 3 and 4"."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds[:-1]))} and {seeds[-1]}"


def sentence(
    judgement: Judgement, margin: float = MARGIN_NATS, baselines: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The verdict on one arm for a reader who is new to all this.

    A second sentence names those of the `baselines` (name, bits_per_byte), which need no neural network, that
    predict better than both.
    """
    return _verdict(judgement, margin) + _counting_beats_both(judgement, baselines)


def _counting_beats_both(judgement: Judgement, baselines: Sequence[Mapping[str, Any]]) -> str:
    bits = [judgement.arm_bits_per_byte, judgement.baseline_bits_per_byte]
    known = [value for value in bits if value is not None]
    rows = [row for row in baselines if known and row["bits_per_byte"] <= min(known)]
    if not rows or judgement.outcome in ("no result", "learned nothing"):
        return ""
    listed = " and ".join(f"{row['name']} ({row['bits_per_byte']:.4f})" for row in rows)
    verb = "predict" if len(rows) > 1 else "predicts"
    return f" Without any neural network {listed} {verb} this text better than both."


def _verdict(judgement: Judgement, margin: float) -> str:
    matched, arm = MATCHED[judgement.matching], f"{KIND[judgement.family]} {judgement.arm}"
    mlp, n = f"the MLP {judgement.baseline}", judgement.seeds
    if judgement.outcome == "no result":
        return f"No verdict: {judgement.reason}{_diverged_text(judgement)}."
    if judgement.outcome == "worse" and not n:
        return (
            f"{matched}, {arm} did worse than {mlp}: it never finished, it diverged in "
            f"{seeds_text(judgement.diverged)}."
        )
    figures, fate = _figures(judgement), _diverged_text(judgement)
    if judgement.outcome == "learned nothing":
        verb = "have" if " and " in judgement.reason else "has"
        return (
            f"No verdict: {judgement.reason} {verb} learned nothing that counting letter sequences or a file "
            f"compressor does not know ({figures}){fate}; train longer before comparing."
        )
    runs = f"{n} runs each" if n > 1 else "one run each"
    if judgement.outcome in ("better", "worse"):
        return (
            f"{matched}, {arm} predicted unseen text {judgement.outcome} than {mlp}: "
            f"{figures} (lower is better), a difference beyond chance over {runs}{fate}."
        )
    if judgement.outcome == "tie":
        return (
            f"{matched}, {arm} and {mlp} predicted unseen text equally well: {figures} over "
            f"{runs}, a difference surely smaller than {margin:g} nats per token."
        )
    assert judgement.difference_nats is not None
    ahead = "ahead of" if judgement.difference_nats < 0 else "behind"
    undecided = "No verdict" if n < 2 else "Undecided"
    return (
        f"{undecided}: {matched[0].lower()}{matched[1:]}, {arm} came out {ahead} {mlp} "
        f"({figures} of unseen text, lower is better), but {_why_undecided(judgement, runs)}{fate}."
    )


def _why_undecided(judgement: Judgement, runs: str) -> str:
    if judgement.seeds < 2:
        return "a single run each cannot tell a better model from luck; a verdict needs at least 2 seeds"
    if judgement.reason.startswith("ahead"):
        return "an arm that diverges is not the better one"
    if judgement.reason == "behind, but the baseline diverged in seeds":
        return "a baseline that diverges is not the better one"
    if judgement.reason.startswith("behind"):
        return "no further than the luckiest of several equal MLPs would be"
    seen = (
        f" (one of {judgement.detectable_nats:.3f} nats would be seen)" if judgement.detectable_nats else ""
    )
    return f"the difference over {runs} is no larger than chance makes it{seen}"


def _figures(judgement: Judgement) -> str:
    if judgement.arm_bits_per_byte is not None and judgement.baseline_bits_per_byte is not None:
        return (
            f"{judgement.arm_bits_per_byte:.4f} against {judgement.baseline_bits_per_byte:.4f} bits per byte"
        )
    return f"{judgement.arm_nats:.4f} against {judgement.baseline_nats:.4f} nats per token"


def _diverged_text(judgement: Judgement) -> str:
    """What to add where seeds diverged; they count against their arm."""
    lost = [
        f"{name} diverged in {seeds_text(seeds)}"
        for name, seeds in (
            (judgement.arm, judgement.diverged),
            (judgement.baseline, judgement.baseline_diverged),
        )
        if seeds
    ]
    return f"; {' and '.join(lost)}" if lost else ""
