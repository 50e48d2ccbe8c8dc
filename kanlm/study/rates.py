"""What the rate of the matrices does to each arm of a study, and to the lead of a KAN, size by size."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean
from typing import Any

from kanlm.stats import paired_difference
from kanlm.study.plan import SIZES, StudyFolder, label_of

INTRODUCTION = """## Rates

At the ladders' sizes and budgets: first each arm's validation loss by the rate of its matrices. A row is
the mean over one set of seeds, each trained at every rate that the row shows, so its numbers compare; an
arm has a row for each set of seeds with two rates or more. Bold: the lowest of a row. Then the test loss of
the KAN less its twin's, both at one rate, with half the width of its 95% interval and the number of seeds."""

KAN, TWIN = "kan_act, normed", "gelu, normed"
Losses = dict[float, dict[int, dict[str, Any]]]
"""By rate and seed, the trials of an arm."""


def losses_by_rate(
    study: StudyFolder, rows: dict[str, dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """The tables, and the rows of the first kind as records for report.json; nothing without a ladder."""
    parts, records = [], []
    for corpus, places in ladder_places(study).items():
        found, leads = [], []
        for place in places:
            arms = arms_at(place, rows)
            of_place = [
                {**place, "arm": label, "coefficients": coefficients, **row}
                for (label, coefficients), own in arms.items()
                for row in comparable(own)
            ]
            found += sorted(of_place, key=lambda row: (row["arm"], row["coefficients"] or 0, row["seeds"]))
            leads += leads_at(place, arms)
        if not found:
            continue
        parts += [f"### {corpus}: validation loss", losses_table(found)]
        if leads:
            parts += [f"### {corpus}: the lead at equal rates", leads_table(leads)]
        records += found
    return ([INTRODUCTION, *parts] if parts else []), records


def ladder_places(study: StudyFolder) -> dict[str, list[dict[str, Any]]]:
    """By corpus, the size, tokens and vocabulary of the ladders' phases, the smallest first."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for phase in study.phases():
        place = {key: phase[key] for key in ("corpus", "size", "tokens", "vocab_size")}
        if "ladder" in phase and place not in found[phase["corpus"]]:
            found[phase["corpus"]].append(place)
    order = list(SIZES)
    return {
        corpus: sorted(places, key=lambda place: (order.index(place["size"]), place["tokens"]))
        for corpus, places in found.items()
    }


def arms_at(place: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[tuple[str, float | None], Losses]:
    """By arm and rate of its coefficients, those whose trials name nothing else that this table does not."""
    arms: dict[tuple[str, float | None], Losses] = defaultdict(lambda: defaultdict(dict))
    for row in rows.values():
        named = {setting.split("=")[0] for setting in row["key"].split(",")}
        if place.items() <= row.items() and named <= {*place, *SHOWN} and "learning_rate" in row:
            arms[label_of(row), row.get("kan_learning_rate")][row["learning_rate"]][row["seed"]] = row
    return arms


SHOWN = ("arm", "hidden_norm", "kan_initial", "learning_rate", "kan_learning_rate", "seed")


def comparable(own: Losses) -> list[dict[str, Any]]:
    """Sets of seeds that several rates have, with the mean validation loss at each; none if one diverged."""
    found: dict[tuple[float, ...], tuple[int, ...]] = {}
    for trials in own.values():
        seeds = set(trials)
        shared = tuple(sorted(rate for rate, others in own.items() if seeds <= set(others)))
        if len(shared) > 1 and len(found.get(shared, ())) < len(seeds):
            found[shared] = tuple(sorted(seeds))
    return [
        {
            "seeds": list(seeds),
            "losses": {f"{rate:g}": mean_valid([own[rate][seed] for seed in seeds]) for rate in shared},
        }
        for shared, seeds in found.items()
    ]


def mean_valid(trials: list[dict[str, Any]]) -> float | None:
    losses = [row.get("valid", math.inf) for row in trials]
    return fmean(losses) if math.isfinite(sum(losses)) else None


def leads_at(place: dict[str, Any], arms: dict[tuple[str, float | None], Losses]) -> list[dict[str, Any]]:
    """By rate of the coefficients, the lead of the KAN over its twin at each rate that both have."""
    twin = {rate: tested(trials) for rate, trials in arms.get((TWIN, None), {}).items()}
    found = []
    for (label, coefficients), own in arms.items():
        if label != KAN:
            continue
        leads = {}
        for rate in sorted(set(own) & set(twin)):
            test = tested(own[rate])
            if seeds := sorted(set(test) & set(twin[rate])):
                leads[f"{rate:g}"] = lead_text([test[s] for s in seeds], [twin[rate][s] for s in seeds])
        if leads:
            found.append({**place, "coefficients": coefficients, "leads": leads})
    return sorted(found, key=lambda row: row["coefficients"] or 0)


def tested(trials: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {seed: row["test"] for seed, row in trials.items() if "test" in row}


def lead_text(own: list[float], other: list[float]) -> str:
    gap = fmean(own) - fmean(other)
    if len(own) == 1:
        return f"{gap:+.4f} (1)"
    half = paired_difference(own, other).high - gap
    return f"{gap:+.4f} ± {half:.4f} ({len(own)})"


def losses_table(found: list[dict[str, Any]]) -> str:
    rows = []
    for row in found:
        losses = row["losses"]
        best = min((loss for loss in losses.values() if loss is not None), default=math.nan)
        coefficients = "" if row["coefficients"] is None else f"{row['coefficients']:g}"
        place = f"{row['size']} | {row['arm']} | {coefficients} | {seeds_text(row['seeds'])}"
        rows.append((place, {rate: loss_text(loss, best) for rate, loss in losses.items()}))
    return table("| size | arm | coefficients | seeds", "|---|---|--:|---", rows)


def leads_table(found: list[dict[str, Any]]) -> str:
    rows = [(f"{row['size']} | {row['coefficients']:g}", row["leads"]) for row in found]
    return table("| size | coefficients", "|---|--:", rows)


def table(header: str, rule: str, rows: list[tuple[str, dict[str, str]]]) -> str:
    """Of rows with their first cells and those by rate, a column for each rate that one of them has."""
    columns = sorted({rate for _, cells in rows for rate in cells}, key=float)
    lines = [f"{header} | {' | '.join(columns)} |", f"{rule}|" + "--:|" * len(columns)]
    lines += [f"| {place} | {' | '.join(cells.get(rate, '') for rate in columns)} |" for place, cells in rows]
    return "\n".join(lines)


def loss_text(loss: float | None, best: float) -> str:
    if loss is None:
        return "diverged"
    return f"**{loss:.4f}**" if loss == best else f"{loss:.4f}"


def seeds_text(seeds: list[int]) -> str:
    """Runs of them, e.g. `0 to 2, 7`."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and runs[-1][-1] == seed - 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
