"""From losses to words: who predicted unseen text better, by rules fixed before the numbers are seen.

For one KAN arm and the best MLP arm at one matching, with d_s = loss(KAN, seed s) - loss(MLP, seed s) in
nats/token over the seeds that both finished:

    no MLP, or an arm that never finished         -> "no result"
    the KAN or the MLP beats no baseline           -> "learned nothing"
    fewer than 2 seeds                             -> "undecided": one run cannot tell skill from luck
    90% interval of the mean of d in +-margin      -> "tie" (equivalence: two one-sided tests at 5%)
    95% interval below 0 / above 0                 -> "better" / "worse"
    else                                           -> "undecided"

The 95% becomes 1 - 0.05/m where m KAN arms are judged (Bonferroni), since the headline names the best of
them. Intervals are Student's, of paired differences: every seed gives both arms the same data in the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from kanlm.compare.artifacts import Artifacts, Result
from kanlm.runs import EvalReport
from kanlm.stats import equivalence, paired_difference

Outcome = Literal["better", "worse", "tie", "undecided", "learned nothing", "no result"]

MATCHED = {
    "parameters": "With equally many parameters",
    "flops": "With equal computation for each token",
    "wallclock": "With equal training time",
}


@dataclass(frozen=True)
class Judgement:
    """One KAN (or control) arm against the best MLP at one matching and size."""

    matching: str
    size: str
    arm: str
    baseline: str | None
    outcome: Outcome
    seeds: int
    arm_bits_per_byte: float | None = None
    baseline_bits_per_byte: float | None = None
    difference_nats: float | None = None
    """Mean of loss(arm) - loss(baseline), nats/token; negative = the arm is better."""
    interval_nats: tuple[float, float] | None = None
    confidence: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def finished(results: Sequence[Result]) -> dict[int, EvalReport]:
    """Evaluations by seed."""
    return {result.trial.seed: result.eval for result in results if result.eval is not None}


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def mean_bits(results: Sequence[Result]) -> float | None:
    values = [result.eval.bits_per_byte for result in results if result.eval is not None]
    return mean(values) if values else None


def best_mlp(results: Sequence[Result]) -> str | None:
    """The MLP arm with the lowest mean loss among those that finished the most seeds."""
    arms: dict[str, list[float]] = {}
    for result in results:
        if result.arm.family == "mlp" and result.eval is not None:
            arms.setdefault(result.trial.arm, []).append(result.eval.loss)
    if not arms:
        return None
    most = max(len(losses) for losses in arms.values())
    return min((mean(losses), arm) for arm, losses in arms.items() if len(losses) == most)[1]


def learned_nothing(bits_per_byte: float, baselines: Sequence[dict[str, Any]]) -> bool:
    """Whether a model is beaten by every baseline that never saw a neural network."""
    return bool(baselines) and all(bits_per_byte >= row["bits_per_byte"] for row in baselines)


def judge(
    results: Sequence[Result],
    arm: str,
    baselines: Sequence[dict[str, Any]],
    margin: float,
    judged_arms: int,
) -> Judgement:
    """The rules of this module for `arm`, from all results at one matching and size."""
    matching, size = results[0].trial.matching, results[0].trial.size
    own = finished([result for result in results if result.trial.arm == arm])
    mlp = best_mlp(results)
    common: dict[str, Any] = {"matching": matching, "size": size, "arm": arm, "baseline": mlp}
    if mlp is None:
        return Judgement(**common, outcome="no result", seeds=len(own), reason="no MLP arm finished")
    other = finished([result for result in results if result.trial.arm == mlp])
    seeds = sorted(set(own) & set(other))
    if not seeds:
        return Judgement(**common, outcome="no result", seeds=0, reason=f"{arm} finished no seed with {mlp}")
    losses = [own[seed].loss for seed in seeds]
    mlp_losses = [other[seed].loss for seed in seeds]
    arm_bits = mean([own[seed].bits_per_byte for seed in seeds])
    mlp_bits = mean([other[seed].bits_per_byte for seed in seeds])
    common |= {
        "seeds": len(seeds),
        "arm_bits_per_byte": arm_bits,
        "baseline_bits_per_byte": mlp_bits,
        "difference_nats": mean(losses) - mean(mlp_losses),
    }
    idle = [name for name, bits in ((arm, arm_bits), (mlp, mlp_bits)) if learned_nothing(bits, baselines)]
    if idle:
        return Judgement(**common, outcome="learned nothing", reason=" and ".join(idle))
    if len(seeds) < 2:
        return Judgement(**common, outcome="undecided", reason="one seed")
    confidence = 1 - 0.05 / judged_arms
    interval = paired_difference(losses, mlp_losses, confidence)
    common |= {"interval_nats": (interval.low, interval.high), "confidence": confidence}
    if equivalence(losses, mlp_losses, margin).equivalent:
        return Judgement(**common, outcome="tie")
    if interval.high < 0 or interval.low > 0:
        return Judgement(**common, outcome="better" if interval.high < 0 else "worse")
    return Judgement(**common, outcome="undecided", reason="the interval holds zero")


def judgements(artifacts: Artifacts, matching: str, size: str) -> list[Judgement]:
    """One for each KAN and control arm, KANs first, the best bits per byte first."""
    results = artifacts.at(matching, size)
    arms = [arm for arm in artifacts.config.arms if arm.family != "mlp"]
    kans = max(1, sum(arm.family == "kan" for arm in arms))
    margin = artifacts.config.evaluation.equivalence_margin_nats
    if not results:
        return []
    judged = [
        (arm.family != "kan", judge(results, arm.name, artifacts.baselines, margin, kans)) for arm in arms
    ]
    judged.sort(key=lambda pair: (pair[0], pair[1].arm_bits_per_byte or math.inf))
    return [judgement for _, judgement in judged]


def sentence(judgement: Judgement, margin: float) -> str:
    """The verdict on one arm in one sentence for a reader who is new to all this."""
    arm, mlp, n = judgement.arm, judgement.baseline, judgement.seeds
    matched = MATCHED[judgement.matching]
    if judgement.outcome == "no result":
        return f"No verdict: {judgement.reason}."
    figures = (
        f"{judgement.arm_bits_per_byte:.4f} against {judgement.baseline_bits_per_byte:.4f} bits per byte"
    )
    if judgement.outcome == "learned nothing":
        verb = "have" if " and " in judgement.reason else "has"
        return (
            f"No verdict: {judgement.reason} {verb} learned nothing that counting letter sequences or a file "
            f"compressor does not know ({figures}); train longer before comparing."
        )
    runs = f"{n} runs each" if n > 1 else "one run each"
    if judgement.outcome in ("better", "worse"):
        return (
            f"{matched}, the KAN {arm} predicted unseen text {judgement.outcome} than the MLP {mlp}: "
            f"{figures} (lower is better), a difference beyond chance over {runs}."
        )
    if judgement.outcome == "tie":
        return (
            f"{matched}, the KAN {arm} and the MLP {mlp} predicted unseen text equally well: {figures} over "
            f"{runs}, a difference surely smaller than {margin:g} nats per token."
        )
    assert judgement.difference_nats is not None
    ahead = "ahead of" if judgement.difference_nats < 0 else "behind"
    why = (
        "a single run each cannot tell a better model from luck"
        if n < 2
        else f"the difference over {runs} is no larger than chance makes it"
    )
    return (
        f"Undecided: {matched[0].lower()}{matched[1:]}, the KAN {arm} came out {ahead} the MLP {mlp} "
        f"({figures} of unseen text, lower is better), but {why}."
    )


def tokens_to_loss(result: Result, target: float) -> float | None:
    """Training tokens after which the validation loss first reached `target`, interpolated; None if never."""
    curve = result.curve
    points = list(zip(curve.validation_tokens, curve.validation_loss, strict=True))
    for (earlier, before), (later, after) in zip(points, points[1:], strict=False):
        if before <= target:
            return earlier
        if after <= target:
            return float(np.interp(target, [after, before], [later, earlier]))
    return points[0][0] if len(points) == 1 and points[0][1] <= target else None
