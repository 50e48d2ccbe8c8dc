"""The three claims under test, each a row of every report: what was measured here, or how to measure it.

1. "A KAN needs 1/100 of the parameters": parameters for equal loss, from runs at several sizes.
2. "A KAN is 10 times slower": training-step time at equal parameters.
3. "A KAN is 10 times faster": training time until both reach one loss.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict
from typing import Any

from kanlm.compare.artifacts import Artifacts
from kanlm.compare.judgement import Judgement, mean
from kanlm.compare.schema import MATCHINGS
from kanlm.compare.verdict import best_mlp, finished, learned_nothing, tokens_to_loss
from kanlm.runs import EvalReport
from kanlm.stats import Rung, median_interval, paired_difference, size_ratio

CLAIMS = {
    "parameters": "A KAN needs 1/100 of an MLP's parameters for equal loss",
    "step_time": "A KAN's training step takes 10 times an MLP's at equal parameters",
    "time_to_loss": "A KAN reaches an MLP's loss in 1/10 of the time",
}
CLAIMED_RATIO = {"parameters": 1 / 100, "step_time": 10.0, "time_to_loss": 1 / 10}
SWEEP_COMMAND = "kanlm compare configs/compare-sizes.toml"
SPEED_COMMAND = "kanlm compare COMPARE.toml speed.rounds=9"


def row(
    claim: str,
    arm: str,
    baseline: str | None,
    ratio: float | None,
    measured: str,
    interval: tuple[float, float] | None = None,
    too_short: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """One claim for one arm. `ratio` is KAN over MLP of what the claim is about; None = not measured.

    verdict, by the interval where there is one, else by the ratio alone: "holds" where all of it is at least
    as extreme as the claim, "does not hold" where none of it is ("partly: only in direction" where it still
    lies beyond 1 by over 5% on the claim's side), "too short to say" where only a part is.
    """
    if ratio is None:
        verdict = "too short to say" if too_short else "not measured"
    elif too_short:
        verdict = "too short to say"
    else:
        ends = interval or (ratio, ratio)
        extreme = sorted(math.log(end) / math.log(CLAIMED_RATIO[claim]) for end in ends)
        beyond_one = extreme[0] * abs(math.log(CLAIMED_RATIO[claim])) > math.log(1.05)
        if extreme[0] >= 1:
            verdict = "holds"
        elif extreme[1] >= 1:
            verdict = "too short to say"
        else:
            verdict = "partly: only in direction" if beyond_one else "does not hold"
    return {
        "claim": claim,
        "statement": CLAIMS[claim],
        "claimed_ratio": CLAIMED_RATIO[claim],
        "arm": arm,
        "baseline": baseline,
        "ratio": ratio,
        "interval": interval,
        "measured": measured,
        "verdict": verdict,
        **more,
    }


def claims(artifacts: Artifacts, judged: list[Judgement]) -> list[dict[str, Any]]:
    """Rows of all three claims for every KAN arm."""
    config = artifacts.config
    size = config.sizes[-1].name
    baseline = best_mlp(artifacts.at(config.matching[0], size))
    rows = []
    for arm in [arm.name for arm in config.arms if artifacts.family(arm.name) == "kan"]:
        rows += [
            parameters_claim(artifacts, arm, baseline, judged),
            step_time_claim(artifacts, size, arm, baseline),
            time_to_loss_claim(artifacts, size, arm, baseline),
        ]
    order = list(CLAIMS)
    return sorted(rows, key=lambda row: order.index(row["claim"]))


def taught(artifacts: Artifacts, size: str, arm: str) -> dict[int, EvalReport]:
    """The arm's evaluations at equal parameters by seed, without those that learned nothing."""
    found = finished(artifacts.at("parameters", size, arm))
    return {
        seed: report
        for seed, report in found.items()
        if not learned_nothing(report.bits_per_byte, artifacts.baselines)
    }


def size_points(artifacts: Artifacts, arm: str) -> tuple[list[float], list[float]]:
    """(non-embedding parameters, mean held-out loss) of the parameter-matched sizes that finished."""
    sizes, losses = [], []
    for size in artifacts.config.sizes:
        done = taught(artifacts, size.name, arm)
        if done:
            sizes.append(float(artifacts.planned("parameters", size.name, arm).non_embedding_parameters))
            losses.append(mean([report.loss for report in done.values()]))
    return sizes, losses


def ladder(artifacts: Artifacts, arm: str, baseline: str) -> list[Rung]:
    """The sizes at which both finished a seed, losses paired by seed."""
    rungs = []
    for size in artifacts.config.sizes:
        own, other = (taught(artifacts, size.name, name) for name in (arm, baseline))
        seeds = sorted(set(own) & set(other))
        if seeds:
            sizes = [
                artifacts.planned("parameters", size.name, name).non_embedding_parameters
                for name in (arm, baseline)
            ]
            losses = [[reports[seed].loss for seed in seeds] for reports in (own, other)]
            rungs.append(Rung(float(sizes[0]), float(sizes[1]), *losses))
    return rungs


def parameters_claim(
    artifacts: Artifacts, arm: str, baseline: str | None, judged: list[Judgement]
) -> dict[str, Any]:
    """Parameters for equal loss, by the power law that is fitted to the baseline's sizes."""
    how = f"not measured by this comparison; `{SWEEP_COMMAND}` runs several sizes"
    if baseline is None or "parameters" not in artifacts.config.matching:
        return row("parameters", arm, baseline, None, how)
    rungs = ladder(artifacts, arm, baseline)
    if min(len({rung.size for rung in rungs}), len({rung.other_size for rung in rungs})) < 3:
        here = next((j for j in judged if j.arm == arm and j.matching == "parameters"), None)
        if here is not None and here.outcome in ("worse", "tie"):
            how += f"; at equal parameters {arm} is no better than {baseline} here, which speaks against it"
        return row("parameters", arm, baseline, None, how)
    found = size_ratio(rungs)
    interval = (found.low, found.high) if found.low is not None and found.high is not None else None
    by_size = ", ".join(
        f"{float(size):,.0f}: {'beyond' if value is None else f'{value:.2f}'}"
        for size, value in found.by_size.items()
    )
    between = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    head = f"{found.ratio:.2f}{between} times the parameters of {baseline}" if found.ratio else "no ratio"
    text = (
        f"{head}, claimed 1/100; by size {by_size}; exponents {found.fit.exponent:.2f} against "
        f"{found.other_fit.exponent:.2f}"
        + (f"; too short to say: {found.too_short}" if found.too_short else "")
    )
    return row(
        "parameters",
        arm,
        baseline,
        found.ratio,
        text,
        interval,
        bool(found.too_short),
        by_size=found.by_size,
        fits={arm: asdict(found.fit), baseline: asdict(found.other_fit)},
    )


def step_rows(artifacts: Artifacts, size: str) -> dict[str, dict[str, Any]]:
    """Rows of speed.json at the parameter matching by arm."""
    rows = artifacts.speed["arms"] if artifacts.speed else []
    return {
        row["arm"]: row
        for row in rows
        if MATCHINGS[row["matching"]].width == "parameters" and row["size"] == size
    }


def step_time_claim(artifacts: Artifacts, size: str, arm: str, baseline: str | None) -> dict[str, Any]:
    """Median over rounds of the ratio of two arms' step times measured next to each other."""
    steps = step_rows(artifacts, size)
    if baseline is None or arm not in steps or baseline not in steps:
        return row("step_time", arm, baseline, None, f"not measured by this comparison; `{SPEED_COMMAND}`")
    own, other = steps[arm], steps[baseline]
    pairs = sorted(a / b for a, b in zip(own["step_seconds"], other["step_seconds"], strict=True))
    ratio = statistics.median(pairs)
    interval = median_interval(pairs) if len(pairs) > 5 else None
    between = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    text = (
        f"{ratio:.2f}{between} times the step time of {baseline}, claimed 10: "
        f"{1000 * own['median_seconds']:.0f} ms against {1000 * other['median_seconds']:.0f} ms, medians of "
        f"{len(pairs)} rounds in turns (ratios {pairs[0]:.2f} to {pairs[-1]:.2f})"
    )
    return row("step_time", arm, baseline, ratio, text, interval)


def time_to_loss_claim(artifacts: Artifacts, size: str, arm: str, baseline: str | None) -> dict[str, Any]:
    """Time until the worse of the two final validation losses, by the validation curves of each seed.

    Tokens are turned into seconds by the step times that were measured in turns, so that a machine that was
    busy during one arm's training does not decide; without them there is no verdict.
    """
    how = "not measured by this comparison; set base.train.eval_every to validate while training"
    if baseline is None:
        return row("time_to_loss", arm, baseline, None, how)
    matching = artifacts.config.matching[0]
    own = {r.trial.seed: r for r in artifacts.at(matching, size, arm) if r.curve.validation_loss}
    other = {r.trial.seed: r for r in artifacts.at(matching, size, baseline) if r.curve.validation_loss}
    steps = step_rows(artifacts, size) if MATCHINGS[matching].width == "parameters" else {}
    ratios = []
    for seed in sorted(set(own) & set(other)):
        finals = (own[seed].curve.validation_loss[-1], other[seed].curve.validation_loss[-1])
        enough = min(len(r.curve.validation_loss) for r in (own[seed], other[seed])) >= 3
        if not enough or not all(map(math.isfinite, finals)):
            continue
        tokens, mlp_tokens = (tokens_to_loss(run, max(finals)) for run in (own[seed], other[seed]))
        if tokens is None or mlp_tokens is None:
            continue
        ratios.append(tokens / mlp_tokens)
    if not ratios:
        return row("time_to_loss", arm, baseline, None, how)
    if arm not in steps or baseline not in steps:
        how = f"not measured: the runs' clocks also count what else the machine did; `{SPEED_COMMAND}`"
        return row("time_to_loss", arm, baseline, None, how)
    speed = steps[baseline]["tokens_per_second"] / steps[arm]["tokens_per_second"]
    logs = [math.log(value * speed) for value in ratios]
    ratio, interval = math.exp(mean(logs)), None
    spread = " (one seed)"
    if len(logs) > 1:
        paired = paired_difference(logs, [0.0] * len(logs))
        interval = (math.exp(paired.low), math.exp(paired.high))
        spread = f" ({interval[0]:.2f} to {interval[1]:.2f} over {len(logs)} seeds)"
    text = (
        f"{ratio:.2f}{spread} times the time of {baseline} to the loss that both reached, claimed 1/10; by "
        "step times measured in turns"
    )
    return row("time_to_loss", arm, baseline, ratio, text, interval)
