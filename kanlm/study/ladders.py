"""How many parameters and how much compute a KAN needs for equal loss: power laws over a study's sizes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from kanlm.model.ffn import find_arm
from kanlm.stats import BEYOND, Rung, SizeRatio, paired_difference, size_ratio
from kanlm.study.figures import ladder
from kanlm.study.plan import SIZES, StudyFolder, key_of, megaflops, rates_of, trials_of

HEADING = """| parameters | tokens | rates of the KAN; of the MLP | seeds | KAN | MLP | difference |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Step:
    """The trials of both arms at one size, in the order of the seeds that both have."""

    tokens: int
    arm: list[dict[str, Any]]
    baseline: list[dict[str, Any]]

    @property
    def losses(self) -> tuple[list[float], list[float]]:
        return [row["test"] for row in self.arm], [row["test"] for row in self.baseline]

    def rung(self) -> Rung:
        sizes = (float(arm[0]["non_embedding_parameters"]) for arm in (self.arm, self.baseline))
        return Rung(next(sizes), next(sizes), *self.losses)

    def compute_rung(self) -> Rung:
        """The same over MFLOPs of training in place of parameters."""
        flops = (megaflops(arm[0]) * self.tokens for arm in (self.arm, self.baseline))
        return Rung(next(flops), next(flops), *self.losses)

    def record(self) -> dict[str, Any]:
        own, other = self.losses
        found = {"parameters": self.arm[0]["non_embedding_parameters"], "tokens": self.tokens}
        found |= {"seeds": len(own), "rates": [rates_of(arm[0]) for arm in (self.arm, self.baseline)]}
        found |= {"arm_nats": fmean(own), "baseline_nats": fmean(other)}
        if len(own) > 1:
            gap = paired_difference(own, other)
            found |= {"difference_nats": gap.mean, "interval_nats": [gap.low, gap.high]}
        return found


def ladders(study: StudyFolder, rows: dict[str, dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Power laws over the phases of each ladder: how many times the MLP's parameters the KAN needs.

    As text and as records for report.json. Where phases of a ladder have one size, an arm's rung is its
    trials of the phase with most seeds, of those the one that is best on validation text. A size at which a
    seed diverged is named, and its ladder has no law.
    """
    by_ladder: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for phase in study.phases():
        if "ladder" in phase:
            by_ladder[phase["ladder"]][phase["size"]].append(phase)
    parts, records = [], []
    for name, phases_by_size in by_ladder.items():
        steps, lines, left_out = [], [HEADING], False
        for phases in (phases_by_size[size] for size in SIZES if size in phases_by_size):
            step, diverged = step_of(phases, rows)
            if diverged:
                left_out = True
                place = f"{phases[0]['size']} | {phases[0]['tokens']:,}"
                lines.append(f"| {place} | | | | | left out, diverged: {diverged} |")
            elif step:
                steps.append(step)
                lines.append(table_row(step.record()))
        if len(lines) == 1:
            continue
        text = f"{len(steps)} of the sizes are trained; a power law needs three."
        if left_out:
            text = "Too short to say: a law without the sizes at which an arm diverged would favour that arm."
        elif len(steps) > 2:
            rungs = [step.rung() for step in steps]
            ratio, compute = size_ratio(rungs), size_ratio([step.compute_rung() for step in steps])
            records.append(record(name, steps, ratio, compute))
            stem = "ladder" if len(records) == 1 else f"ladder-{len(records)}"
            drawn = ladder(rungs, (ratio.fit, ratio.other_fit), study.path / f"{stem}.svg")
            text = f"{ladder_sentence(rungs, ratio)} {compute_sentence(compute)}\n\n"
            text += f"![losses by size and the fitted power laws]({drawn})"
        parts.append(f"### {name}\n\n" + "\n".join(lines) + "\n\n" + text)
    return parts, records


def step_of(phases: list[dict[str, Any]], rows: dict[str, dict[str, Any]]) -> tuple[Step | None, str]:
    """Of the phases of one size; and the seeds that diverged, by arm."""
    own, other = (best_trials(phases, family, rows) for family in ("kan", "mlp"))
    diverged = [
        f"{row['arm']} seed {seed}"
        for arm in (own, other)
        for seed, row in arm.items()
        if row["state"] == "diverged"
    ]
    seeds = sorted(set(own) & set(other))
    if diverged or not seeds:
        return None, ", ".join(diverged)
    return Step(phases[0]["tokens"], [own[seed] for seed in seeds], [other[seed] for seed in seeds]), ""


def best_trials(
    phases: list[dict[str, Any]], family: str, rows: dict[str, dict[str, Any]]
) -> dict[int, dict[str, Any]]:
    """By seed, the trials of the family's arm in the phase that suits it best: of those with most seeds the
    best on validation text, for which a seed that diverged is infinitely bad.
    """
    found = []
    for phase in phases:
        done = (rows[key] for trial in trials_of(phase) if (key := key_of(trial)) in rows)
        own = (row for row in done if not row.get("frozen") and find_arm(row["arm"]).family == family)
        found.append({row["seed"]: row for row in own if "test" in row or row["state"] == "diverged"})

    def badness(own: dict[int, dict[str, Any]]) -> tuple[int, float]:
        losses = [row.get("valid", math.inf) for row in own.values()]
        return -len(losses), fmean(losses) if losses else math.inf

    return min(found, key=badness)


def table_row(step: dict[str, Any]) -> str:
    gap = f"{step['arm_nats'] - step['baseline_nats']:+.4f}"
    if "interval_nats" in step:
        low, high = step["interval_nats"]
        gap += f" ({low:+.4f} to {high:+.4f})"
    return (
        f"| {step['parameters']:,} | {step['tokens']:,} | {'; '.join(step['rates'])} | {step['seeds']} | "
        f"{step['arm_nats']:.4f} | {step['baseline_nats']:.4f} | {gap} |"
    )


def record(name: str, steps: list[Step], ratio: SizeRatio, compute: SizeRatio) -> dict[str, Any]:
    crossing = ratio.crossing_interval or ()
    return {
        "name": name,
        "rungs": [step.record() for step in steps],
        "ratio": ratio.ratio,
        "interval": [ratio.low, ratio.high],
        "compute_ratio": compute.ratio,
        "compute_interval": [compute.low, compute.high],
        "by_size": list(ratio.by_size.values()),
        "by_size_interval": [ratio.by_size_interval.get(size) for size in ratio.by_size],
        "exponents": [ratio.fit.exponent, ratio.other_fit.exponent],
        "exponents_interval": ratio.exponents_interval,
        "crossing": ratio.crossing,
        "crossing_interval": [size if math.isfinite(size) else None for size in crossing],
    }


def ladder_sentence(rungs: list[Rung], found: SizeRatio) -> str:
    by_size = []
    for size, value in found.by_size.items():
        said = "beyond" if value is None else f"{value:.2f}"
        if interval := found.by_size_interval.get(size):
            said += " ({:.2f} to {:.2f})".format(*interval)
        by_size.append(f"{float(size):,.0f}: {said}")
    laws = []
    for place, (arm, fit) in enumerate((("KAN", found.fit), ("MLP", found.other_fit))):
        said = f"{arm} {fit.irreducible:.2f} + ({fit.scale:.3g} / N)^{fit.exponent:.3f}"
        if found.exponents_interval:
            said += ", the exponent {:.3f} to {:.3f}".format(*found.exponents_interval[place])
        laws.append(said)
    short = f" Too short to say: {found.too_short}." if found.too_short else ""
    return (
        f"For equal loss the KAN needs {ratio_text(found, 'parameters')}, claimed 1/100; by size "
        f"{', '.join(by_size)}. Loss in nats/token of N parameters: {'; '.join(laws)}.{short}"
        f"{crossing_text(found, rungs)}"
    )


def crossing_text(found: SizeRatio, rungs: list[Rung]) -> str:
    """Where the laws cross, an extrapolation; nothing without several seeds a size."""
    if found.crossing_interval is None:
        return ""
    largest, beyond = max(rung.size for rung in rungs), f"beyond {BEYOND} times the largest size"
    low, high = (f"{size:,.0f}" if math.isfinite(size) else beyond for size in found.crossing_interval)
    if found.crossing is None:
        where = f"do not cross up to {BEYOND} times the largest size"
    elif found.crossing <= largest:
        where = "have crossed at the largest size already"
    else:
        where = f"cross near {found.crossing:,.0f} parameters, beyond which the MLP's is lower"
    return (
        f" These laws {where} ({low} to {high}): an extrapolation, for which {len(rungs)} sizes are too few. "
        "Intervals of a size, an exponent and the crossing are 95% over seeds drawn anew; for three seeds "
        "too narrow."
    )


def compute_sentence(found: SizeRatio) -> str:
    """The time, as far as it is arithmetic: what a step costs beyond its FLOPs is measured elsewhere."""
    short = f" Too short to say: {found.too_short}." if found.too_short else ""
    return (
        f"In training FLOPs, with the tokens of these rows, it needs {ratio_text(found, 'compute')}.{short}"
    )


def ratio_text(found: SizeRatio, what: str) -> str:
    if found.ratio is None:
        return "no ratio"
    interval = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f}, 95%)"
    return f"{found.ratio:.2f} times the MLP's {what}{interval}"
