"""The three claims under test, each a row of every report: what was measured here, or how to measure it.

1. "A KAN needs 1/100 of the parameters": parameters for equal loss, from runs at several sizes.
2. "A KAN is 10 times slower": training-step time at equal parameters.
3. "A KAN is 10 times faster": training time until both reach one loss.
"""

from __future__ import annotations

import math
from typing import Any

from kanlm.compare.artifacts import Artifacts
from kanlm.compare.judgement import Judgement, mean
from kanlm.compare.verdict import best_mlp, finished, tokens_to_loss
from kanlm.stats import scaling_fits

CLAIMS = {
    "parameters": "A KAN needs 1/100 of an MLP's parameters for equal loss",
    "step_time": "A KAN's training step takes 10 times an MLP's at equal parameters",
    "time_to_loss": "A KAN reaches an MLP's loss in 1/10 of the time",
}
CLAIMED_RATIO = {"parameters": 1 / 100, "step_time": 10.0, "time_to_loss": 1 / 10}
SWEEP_COMMAND = "kanlm compare configs/compare-sizes.toml"
SPEED_COMMAND = "kanlm compare COMPARE.toml speed.rounds=9"


def row(claim: str, arm: str, baseline: str | None, ratio: float | None, measured: str) -> dict[str, Any]:
    """One claim for one arm. `ratio` is KAN over MLP of what the claim is about; None = not measured.

    verdict: "holds" where the measured ratio is at least as extreme as the claim, "partly" where it only has
    the claim's direction (by over 5%), else "does not hold".
    """
    if ratio is None:
        verdict = "not measured"
    else:
        claimed = CLAIMED_RATIO[claim]
        extreme = math.log(ratio) / math.log(claimed)
        toward = abs(math.log(ratio)) > math.log(1.05) and extreme > 0
        verdict = "holds" if extreme >= 1 else "partly: only in direction" if toward else "does not hold"
    return {
        "claim": claim,
        "statement": CLAIMS[claim],
        "claimed_ratio": CLAIMED_RATIO[claim],
        "arm": arm,
        "baseline": baseline,
        "ratio": ratio,
        "measured": measured,
        "verdict": verdict,
    }


def claims(artifacts: Artifacts, judged: list[Judgement]) -> list[dict[str, Any]]:
    """Rows of all three claims for every KAN arm."""
    config = artifacts.config
    size = config.sizes[-1].name
    baseline = best_mlp(artifacts.at(config.matching[0], size))
    rows = []
    for arm in [arm.name for arm in config.arms if arm.family == "kan"]:
        rows += [
            parameters_claim(artifacts, arm, baseline, judged),
            step_time_claim(artifacts, size, arm, baseline),
            time_to_loss_claim(artifacts, size, arm, baseline),
        ]
    order = list(CLAIMS)
    return sorted(rows, key=lambda row: order.index(row["claim"]))


def size_points(artifacts: Artifacts, arm: str) -> tuple[list[float], list[float]]:
    """(non-embedding parameters, mean held-out loss) of the parameter-matched sizes that finished."""
    sizes, losses = [], []
    for size in artifacts.config.sizes:
        done = finished(artifacts.at("parameters", size.name, arm))
        if done:
            sizes.append(float(artifacts.planned("parameters", size.name, arm).non_embedding_parameters))
            losses.append(mean([report.loss for report in done.values()]))
    return sizes, losses


def parameters_claim(
    artifacts: Artifacts, arm: str, baseline: str | None, judged: list[Judgement]
) -> dict[str, Any]:
    """Ratio of the scales of two power laws that share exponent and floor, where three sizes were run."""
    how = f"not measured by this comparison; `{SWEEP_COMMAND}` runs several sizes"
    if baseline is None or "parameters" not in artifacts.config.matching:
        return row("parameters", arm, baseline, None, how)
    points = {name: size_points(artifacts, name) for name in (arm, baseline)}
    if min(len(set(sizes)) for sizes, _ in points.values()) < 3:
        here = next((j for j in judged if j.arm == arm and j.matching == "parameters"), None)
        if here is not None and here.outcome in ("worse", "tie"):
            how += f"; at equal parameters {arm} is no better than {baseline} here, which speaks against it"
        return row("parameters", arm, baseline, None, how)
    fits = scaling_fits(points)
    if not (fits[arm].scale > 0 and fits[baseline].scale > 0):
        return row("parameters", arm, baseline, None, "loss does not fall with size here; no ratio exists")
    ratio = fits[arm].scale / fits[baseline].scale
    low, high = min(points[arm][0]), max(points[arm][0])
    text = (
        f"{ratio:.2f} times the parameters of {baseline}, power laws fitted to {len(points[arm][0])} sizes "
        f"of {low:,.0f} to {high:,.0f} (residual {fits[arm].rms:.3f} nats)"
    )
    return row("parameters", arm, baseline, ratio, text)


def step_rows(artifacts: Artifacts, size: str) -> dict[str, dict[str, Any]]:
    """Rows of speed.json at the parameter matching by arm."""
    rows = artifacts.speed["arms"] if artifacts.speed else []
    return {row["arm"]: row for row in rows if row["matching"] != "flops" and row["size"] == size}


def step_time_claim(artifacts: Artifacts, size: str, arm: str, baseline: str | None) -> dict[str, Any]:
    """Median over rounds of the ratio of two arms' step times measured next to each other."""
    steps = step_rows(artifacts, size)
    if baseline is None or arm not in steps or baseline not in steps:
        return row("step_time", arm, baseline, None, f"not measured by this comparison; `{SPEED_COMMAND}`")
    own, other = steps[arm], steps[baseline]
    pairs = sorted(a / b for a, b in zip(own["step_seconds"], other["step_seconds"], strict=True))
    ratio = median(pairs)
    text = (
        f"{ratio:.2f} times the step time of {baseline}: {1000 * own['median_seconds']:.0f} ms against "
        f"{1000 * other['median_seconds']:.0f} ms, medians of {len(pairs)} rounds in turns (ratios "
        f"{pairs[0]:.2f} to {pairs[-1]:.2f})"
    )
    return row("step_time", arm, baseline, ratio, text)


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


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
    steps = step_rows(artifacts, size) if matching != "flops" else {}
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
    ratios = [value * speed for value in ratios]
    ratio = math.exp(mean([math.log(value) for value in ratios]))
    spread = f" (seeds {min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else " (one seed)"
    text = (
        f"{ratio:.2f} times the time of {baseline} to the loss that both reached{spread}, by step times "
        "measured in turns"
    )
    return row("time_to_loss", arm, baseline, ratio, text)
