"""The three claims under test, each a row of every report: what was measured here, or how to measure it.

1. "A KAN needs 1/100 of the parameters": parameters for equal loss, from runs at several sizes.
2. "A KAN is 10 times slower": training-step time at equal parameters.
3. "A KAN is 10 times faster": training time until both reach one loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import numpy as np

from kanlm.compare.artifacts import Artifacts, Result, Table, step_time_ratios
from kanlm.compare.judgement import Judgement
from kanlm.compare.schema import MATCHINGS
from kanlm.stats import PairedDifference, Rung, SizeRatio, median_interval, paired_difference, size_ratio

CLAIMS = {
    "parameters": "A KAN needs 1/100 of an MLP's parameters for equal loss",
    "step_time": "A KAN's training step takes 10 times an MLP's at equal parameters",
    "time_to_loss": "A KAN reaches an MLP's loss in 1/10 of the time",
}
CLAIMED_RATIO = {"parameters": 1 / 100, "step_time": 10.0, "time_to_loss": 1 / 10}
SWEEP_COMMAND = "kanlm compare compare-sizes"
SPEED_COMMAND = "kanlm compare COMPARE.toml speed.rounds=9"


def claims(artifacts: Artifacts, judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Rows of all three claims for every KAN arm: what its runs gave, what that says, and its words."""
    shown = artifacts.shown
    baseline = next(
        (j.baseline for j in judged if (j.matching, j.size) == (shown.matching, shown.size)), None
    )
    equal = [table for table in artifacts.tables if table.matching == "parameters"]  # one for each size
    rows = []
    for arm in [arm for arm, runs in shown.arms.items() if runs.planned.family == "kan"]:
        rungs = ladder(equal, arm, baseline)
        step_rows = step_times(equal[-1] if equal else None, arm, baseline)
        steps = sorted(step_time_ratios(*(row["step_seconds"] for row in step_rows))) if step_rows else []
        tokens, slowdown = token_ratios(shown, arm, baseline), step_slowdown(shown, arm, baseline)
        times = [math.log(ratio * slowdown) for ratio in tokens] if slowdown else []

        sizes = size_ratio(rungs) if rungs else None
        step_interval = median_interval(steps) if len(steps) > 5 else None
        over_seeds = paired_difference(times, [0.0] * len(times)) if len(times) > 1 else None

        rows += [
            parameters_row(arm, baseline, sizes, judged if equal else ()),
            step_time_row(arm, baseline, steps, step_interval, step_rows),
            time_to_loss_row(arm, baseline, times, over_seeds, measured=bool(tokens)),
        ]
    order = list(CLAIMS)
    return sorted(rows, key=lambda row: order.index(row["claim"]))


def ladder(tables: Sequence[Table], arm: str, baseline: str | None) -> list[Rung]:
    """The sizes at which both finished a seed at equal parameters, paired by seed; none below three sizes."""
    if baseline is None:
        return []
    rungs = []
    for table in tables:
        own, other = table.arms[arm], table.arms[baseline]
        seeds = sorted(set(own.taught) & set(other.taught))
        if seeds:
            sizes = [float(runs.planned.non_embedding_parameters) for runs in (own, other)]
            losses = [[runs.taught[seed].loss for seed in seeds] for runs in (own, other)]
            rungs.append(Rung(sizes[0], sizes[1], *losses))
    different = min(len({rung.size for rung in rungs}), len({rung.other_size for rung in rungs}))
    return rungs if different >= 3 else []


def step_times(table: Table | None, arm: str, baseline: str | None) -> list[dict[str, Any]]:
    """The rows of speed.json of both, at equal parameters; empty where one was not measured."""
    if table is None or baseline is None:
        return []
    rows = [table.arms[name].speed for name in (arm, baseline)]
    return [row for row in rows if row is not None] if all(rows) else []


def token_ratios(table: Table, arm: str, baseline: str | None) -> list[float]:
    """Of each seed: the arm's tokens over the baseline's until the worse of the final validation losses."""
    if baseline is None:
        return []
    own, other = (
        {run.trial.seed: run for run in table.arms[name].results if run.curve.validation_loss}
        for name in (arm, baseline)
    )
    ratios = []
    for seed in sorted(set(own) & set(other)):
        finals = (own[seed].curve.validation_loss[-1], other[seed].curve.validation_loss[-1])
        enough = min(len(run.curve.validation_loss) for run in (own[seed], other[seed])) >= 3
        if not enough or not all(map(math.isfinite, finals)):
            continue
        tokens, mlp_tokens = (tokens_to_loss(run, max(finals)) for run in (own[seed], other[seed]))
        if tokens is not None and mlp_tokens is not None:
            ratios.append(tokens / mlp_tokens)
    return ratios


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


def step_slowdown(table: Table, arm: str, baseline: str | None) -> float | None:
    """The arm's time of a training token over the baseline's, at equal parameters.

    By the step times that were measured in turns, so that a machine that was busy during one arm's training
    does not decide; None without them.
    """
    if baseline is None or MATCHINGS[table.matching].width != "parameters":
        return None
    own, other = table.arms[arm].speed, table.arms[baseline].speed
    return median(step_time_ratios(own["step_seconds"], other["step_seconds"])) if own and other else None


def parameters_row(
    arm: str, baseline: str | None, found: SizeRatio | None, judged: Sequence[Judgement]
) -> dict[str, Any]:
    """Parameters for equal loss, by the power law that is fitted to the baseline's sizes."""
    if found is None:
        how = f"not measured by this comparison; `{SWEEP_COMMAND}` runs several sizes"
        here = next((j for j in judged if j.arm == arm and j.matching == "parameters"), None)
        if baseline is not None and here is not None and here.outcome in ("worse", "tie"):
            how += f"; at equal parameters {arm} is no better than {baseline} here, which speaks against it"
        return row("parameters", arm, baseline, None, how)
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
        fits={arm: asdict(found.fit), str(baseline): asdict(found.other_fit)},
    )


def step_time_row(
    arm: str,
    baseline: str | None,
    ratios: Sequence[float],
    interval: tuple[float, float] | None,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Median over rounds of the ratio of two arms' step times measured next to each other."""
    if not ratios:
        return row("step_time", arm, baseline, None, f"not measured by this comparison; `{SPEED_COMMAND}`")
    between = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    own, other = rows
    text = (
        f"{median(ratios):.2f}{between} times the step time of {baseline}, claimed 10: "
        f"{1000 * own['median_seconds']:.0f} ms against {1000 * other['median_seconds']:.0f} ms, medians of "
        f"{len(ratios)} rounds in turns (ratios {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    return row("step_time", arm, baseline, median(ratios), text, interval)


def time_to_loss_row(
    arm: str, baseline: str | None, logs: Sequence[float], over_seeds: PairedDifference | None, measured: bool
) -> dict[str, Any]:
    """Time until both reach one loss; `logs`: of each seed's ratio; `measured`: whether there are curves."""
    if not logs:
        how = "not measured by this comparison; set base.train.eval_every to validate while training"
        if measured:
            how = f"not measured: the runs' clocks also count what else the machine did; `{SPEED_COMMAND}`"
        return row("time_to_loss", arm, baseline, None, how)
    ratio, interval, spread = math.exp(fmean(logs)), None, " (one seed)"
    if over_seeds is not None:
        interval = (math.exp(over_seeds.low), math.exp(over_seeds.high))
        spread = f" ({interval[0]:.2f} to {interval[1]:.2f} over {len(logs)} seeds)"
    text = (
        f"{ratio:.2f}{spread} times the time of {baseline} to the loss that both reached, claimed 1/10; by "
        "step times measured in turns"
    )
    return row("time_to_loss", arm, baseline, ratio, text, interval)


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
