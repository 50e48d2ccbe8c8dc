"""How many parameters and how much compute a KAN needs for equal loss: power laws over the study's sizes."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean
from typing import Any

import numpy as np
from study_figures import ladder
from study_plan import RESULTS, key_of, megaflops, plan, rates_of, trials_of

from kanlm.model.ffn import find_arm
from kanlm.stats import Rung, ScalingFit, SizeRatio, paired_difference, size_ratio


def ladders(rows: dict[str, dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Power laws over the phases of each ladder: how many times the MLP's parameters the KAN needs.

    As text and as records for report.json. Where phases of a ladder have one size, an arm's rung is its
    trials of the phase with most seeds, of those the one that is best on validation text.
    """
    by_ladder = defaultdict(lambda: defaultdict(list))
    for phase in plan():
        if "ladder" in phase:
            by_ladder[phase["ladder"]][phase["size"]].append(phase)
    parts, records = [], []
    for name, phases_by_size in by_ladder.items():
        rungs: list[Rung] = []
        by_compute: list[Rung] = []
        steps: list[dict[str, Any]] = []
        lines = [
            "| parameters | tokens | rates of the KAN; of the MLP | seeds | KAN | MLP | difference |",
            "|---|---|---|---|---|---|---|",
        ]
        for phases in phases_by_size.values():
            own, other = (best_trials(phases, family, rows) for family in ("kan", "mlp"))
            seeds = sorted(set(own) & set(other))
            if not seeds:
                continue
            pairs = [[arm[seed] for seed in seeds] for arm in (own, other)]
            losses = [[row["test"] for row in arm] for arm in pairs]
            sizes = [arm[0]["non_embedding_parameters"] for arm in pairs]
            rungs.append(Rung(*map(float, sizes), *losses))
            flops = [megaflops(arm[0]) * phases[0]["tokens"] for arm in pairs]
            by_compute.append(Rung(*flops, *losses))
            gap = f"{fmean(losses[0]) - fmean(losses[1]):+.4f}"
            measured = {"parameters": sizes[0], "tokens": phases[0]["tokens"], "seeds": len(seeds)}
            measured |= {"rates": [rates_of(arm[0]) for arm in pairs]}
            measured |= {"arm_nats": fmean(losses[0]), "baseline_nats": fmean(losses[1])}
            if len(seeds) > 1:
                found = paired_difference(*losses)
                gap += f" ({found.low:+.4f} to {found.high:+.4f})"
                measured |= {"difference_nats": found.mean, "interval_nats": [found.low, found.high]}
            steps.append(measured)
            lines.append(
                f"| {sizes[0]:,} | {phases[0]['tokens']:,} | {'; '.join(measured['rates'])} | "
                f"{len(seeds)} | {fmean(losses[0]):.4f} | {fmean(losses[1]):.4f} | {gap} |"
            )
        if not rungs:
            continue
        ratio = size_ratio(rungs) if len(rungs) > 2 else None
        if ratio:
            compute = size_ratio(by_compute)
            found_ratio = {"ratio": ratio.ratio, "interval": [ratio.low, ratio.high]}
            found_ratio |= {"compute_ratio": compute.ratio, "compute_interval": [compute.low, compute.high]}
            by_size = list(ratio.by_size.values())
            records.append({"name": name, "rungs": steps, **found_ratio, "by_size": by_size})
        text = ladder_sentence(rungs, ratio) + (compute_sentence(compute) if ratio else "")
        parts.append(f"### {name}\n\n" + "\n".join(lines) + "\n\n" + text)
        if ratio:
            stem = "ladder" if len(records) == 1 else f"ladder-{len(records)}"
            drawn = ladder(rungs, (ratio.fit, ratio.other_fit), RESULTS.with_name(f"{stem}.svg"))
            parts.append(f"![losses by size and the fitted power laws]({drawn})")
    return parts, records


def best_trials(
    phases: list[dict[str, Any]], family: str, rows: dict[str, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """By seed, the tested trials of the family's arm in the phase that suits it best."""
    found = []
    for phase in phases:
        trials = [rows.get(key_of(trial), {}) for trial in trials_of((phase["name"],))]
        tested = (row for row in trials if "test" in row and "frozen" not in row)
        found.append({row["seed"]: row for row in tested if find_arm(row["arm"]).family == family})
    return min(
        found, key=lambda own: (-len(own), fmean(row["valid"] for row in own.values()) if own else math.inf)
    )


def ladder_sentence(rungs: list[Rung], found: SizeRatio | None) -> str:
    if found is None:
        return f"{len(rungs)} of the sizes are trained; a power law needs three."
    by_size = ", ".join(
        f"{float(size):,.0f}: {'beyond' if value is None else f'{value:.2f}'}"
        for size, value in found.by_size.items()
    )
    laws = "; ".join(
        f"{arm} {fit.irreducible:.2f} + ({fit.scale:.3g} / N)^{fit.exponent:.3f}"
        for arm, fit in (("KAN", found.fit), ("MLP", found.other_fit))
    )
    ratio = ratio_text(found, "parameters")
    short = f" Too short to say: {found.too_short}." if found.too_short else ""
    crossing = crosses(found.fit, found.other_fit, max(rung.size for rung in rungs))
    beyond = (
        f" These laws cross near {crossing:,.0f} parameters, beyond which the MLP's is lower: an "
        f"extrapolation, for which {len(rungs)} sizes are too few."
        if crossing
        else ""
    )
    return (
        f"For equal loss the KAN needs {ratio}, claimed 1/100; by size {by_size}. Loss in nats/token of N "
        f"parameters: {laws}.{short}{beyond}"
    )


def compute_sentence(found: SizeRatio) -> str:
    """The time, as far as it is arithmetic: what a step costs beyond its FLOPs is measured elsewhere."""
    short = f" Too short to say: {found.too_short}." if found.too_short else ""
    return (
        f" In training FLOPs, with the tokens of these rows, it needs {ratio_text(found, 'compute')}.{short}"
    )


def ratio_text(found: SizeRatio, what: str) -> str:
    if found.ratio is None:
        return "no ratio"
    interval = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f}, 95%)"
    return f"{found.ratio:.2f} times the MLP's {what}{interval}"


def crosses(law: ScalingFit, other: ScalingFit, largest: float) -> float | None:
    """The size beyond `largest`, to a thousand times it, from which `other` is the lower; or None."""
    sizes = np.geomspace(largest, 1000 * largest, 2000)
    ahead = [law.loss(size) < other.loss(size) for size in sizes]
    return float(sizes[ahead.index(False)]) if ahead[0] and not all(ahead) else None
