"""Pictures of the report: matplotlib figures as inline SVG, narrow enough to be read on a phone.

`report_pictures` chooses what is drawn; the functions that draw return the text of one `<svg>` element. Text
stays text (searchable, in the page's font), and the same artifacts give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kanlm.compare.artifacts import Artifacts, Result, step_speeds
from kanlm.compare.schema import MATCHINGS
from kanlm.interpret.pictures import figure_svg, learned_functions_svg, spread

BASELINE_COLOUR = "#6b7280"
DRAWN_FUNCTIONS = 12
"""Panels of learned functions for each arm."""


def report_pictures(artifacts: Artifacts, content: dict[str, Any]) -> dict[str, dict[str, str]]:
    """`{name: {"svg", "caption", "section"}}`; a picture without data is left out. `content`: report.json."""
    shown, colour = artifacts.shown, artifacts.colours
    series = {arm: size_points(artifacts, arm) for arm in shown.arms}
    series = {arm: points for arm, points in series.items() if len(points) > 1}
    results = [result for runs in shown.arms.values() for result in runs.results]
    pictures: dict[str, dict[str, str]] = {}

    def add(name: str, section: str, svg: str, caption: str) -> None:
        pictures[name] = {"svg": svg, "caption": caption, "section": section}

    if any(result.eval for result in results):
        add(
            "quality",
            "quality",
            quality(results, artifacts.baselines, colour, "quality"),
            "Bits per byte of unseen text: a dot for each seed, a bar at the mean; dashed: what needs no "
            "neural network.",
        )
    if any(result.curve.loss for result in results):
        width = MATCHINGS[shown.matching].width
        speeds = step_speeds(artifacts.speed, artifacts.config.reference)
        keys = {arm: (width, shown.size, arm) for arm in shown.arms}
        measured = {arm: speeds[key] for arm, key in keys.items() if key in speeds}
        measured = measured if len(measured) == len(keys) else {}
        source = "step times measured in turns" if measured else "the runs' clocks"
        for against, words in (("tokens", "tokens seen"), ("seconds", f"training time, by {source}")):
            add(
                f"loss-{against}",
                "curves",
                loss_curves(results, colour, against, f"loss-{against}", measured),
                f"Loss against {words}. Lines: training, smoothed, one for each seed; dots: held-out text.",
            )
    place = shown.matching, shown.size
    table = next(one for one in content["tables"] if (one["matching"], one["size"]) == place)
    rows = [
        {
            "arm": row["arm"],
            "low": None,
            "high": None,
            **(shown.arms[row["arm"]].speed or {}),
            "tokens_per_second": row["tokens_per_second"],
        }
        for row in table["rows"]
        if row["tokens_per_second"]
    ]
    if rows:
        in_turns = "measured in turns; the line spans the middle half of the rounds"
        source = in_turns if rows[0]["low"] else "of the runs"
        add("throughput", "speed", throughput(rows, colour, "throughput"), f"Training speed, {source}.")
    tried = [row for row in artifacts.sweep if row["size"] == shown.size and len(row["trials"]) > 1]
    if tried:
        add(
            "sweep",
            "curves",
            sweep(tried, colour, "sweep", "learning_rate"),
            "Learning rates tried, each with the best rate of the coefficients; the filled point was chosen.",
        )
    if any(trial["kan_learning_rate"] for row in tried for trial in row["trials"]):
        add(
            "sweep-coefficients",
            "curves",
            sweep(tried, colour, "sweep-coefficients", "kan_learning_rate"),
            "Rates of the KAN coefficients tried; the filled point was chosen.",
        )
    if series:
        add(
            "scaling",
            "quality",
            scaling(series, colour, "scaling"),
            "Loss at several sizes, mean over seeds.",
        )
    for arm, runs in shown.arms.items():
        found = next((result.functions for result in runs.results if result.functions), None)
        if found and found["curves"]:
            curves = spread(found["curves"], DRAWN_FUNCTIONS)
            add(
                f"functions-{arm}",
                "functions",
                learned_functions_svg(curves, colour[arm], f"functions-{arm}"),
                f"{arm}: {found['caption']}",
            )
    return pictures


def size_points(artifacts: Artifacts, arm: str) -> list[tuple[float, float]]:
    """(non-embedding parameters, mean held-out loss) of the parameter-matched sizes that finished."""
    runs = [table.arms[arm] for table in artifacts.tables if table.matching == "parameters"]
    return [
        (float(one.planned.non_embedding_parameters), fmean(report.loss for report in one.taught.values()))
        for one in runs
        if one.taught
    ]


def short(value: float, _position: int | None = None) -> str:
    """1234567 -> 1.23M."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def smoothed(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Trailing mean over `window` values, over fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def loss_curves(
    results: Sequence[Result],
    colour: dict[str, str],
    against: str,
    name: str,
    tokens_per_second: dict[str, float] | None = None,
) -> str:
    """Training losses (thin: each seed) and validation losses (dots) against `tokens` or `seconds`.

    Seconds are those of the runs' clocks, or follow from the tokens by `tokens_per_second` of each arm.
    """
    with figure_svg(name, 3.3) as (figure, output):
        axes = figure.add_subplot()
        labelled: set[str] = set()
        ends = []
        for result in results:
            curve, arm = result.curve, result.trial.arm
            if against == "seconds" and tokens_per_second:
                speed = tokens_per_second[arm]
                places = [tokens / speed for tokens in curve.tokens]
                validation_places = [tokens / speed for tokens in curve.validation_tokens]
            else:
                places = getattr(curve, against)
                validation_places = getattr(curve, f"validation_{against}")
            finite = np.isfinite(curve.loss) if curve.loss else np.zeros(0, bool)
            if not finite.any():
                continue
            window = max(1, len(curve.loss) // 40)
            loss = smoothed(np.where(finite, curve.loss, np.nan), window)
            label = arm if arm not in labelled else None
            labelled.add(arm)
            axes.plot(places, loss, color=colour[arm], label=label, alpha=0.85, linewidth=1.2)
            axes.plot(
                validation_places,
                curve.validation_loss,
                "o",
                color=colour[arm],
                markersize=4,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
            ends.append((min(loss[np.isfinite(loss)]), np.nanpercentile(loss, 85)))
        if ends:
            low, high = min(end[0] for end in ends), max(end[1] for end in ends)
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low) or None)
            axes.legend(loc="upper right")
        axes.set_xlabel("training tokens" if against == "tokens" else "training time, seconds")
        axes.set_ylabel("loss, nats per token")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_major_locator(MaxNLocator(6))
    return output[0]


def quality(
    results: Sequence[Result], baselines: Sequence[dict[str, Any]], colour: dict[str, str], name: str
) -> str:
    """Bits per byte: a dot for each seed, a tick for the mean, dashed lines for the baselines."""
    arms = list(dict.fromkeys(result.trial.arm for result in results))
    with figure_svg(name, 0.9 + 0.38 * len(arms)) as (figure, output):
        axes = figure.add_subplot()
        for row, arm in enumerate(arms):
            values = [r.eval.bits_per_byte for r in results if r.trial.arm == arm and r.eval]
            if not values:
                continue
            axes.plot(values, [row] * len(values), "o", color=colour[arm], alpha=0.75, markersize=6)
            axes.plot([np.mean(values)], [row], "|", color=colour[arm], markersize=16, markeredgewidth=2)
        for place, baseline in enumerate(sorted(baselines, key=lambda row: row["bits_per_byte"])):
            axes.axvline(baseline["bits_per_byte"], color=BASELINE_COLOUR, linestyle="--", linewidth=1)
            axes.annotate(
                baseline["name"],
                (baseline["bits_per_byte"], 1),
                xycoords=("data", "axes fraction"),
                ha="right" if place == 0 and len(baselines) > 1 else "left",
                va="bottom",
                fontsize=8,
                color=BASELINE_COLOUR,
            )
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel("bits per byte of unseen text (left is better)")
        axes.grid(axis="y", visible=False)
    return output[0]


def throughput(rows: Sequence[dict[str, Any]], colour: dict[str, str], name: str) -> str:
    """Bars of training tokens/s; the whisker spans the middle half of the measured rounds."""
    with figure_svg(name, 0.8 + 0.38 * len(rows)) as (figure, output):
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            axes.barh(place, row["tokens_per_second"], color=colour[row["arm"]], height=0.62)
            low, high = row.get("low"), row.get("high")
            if low is not None:
                axes.plot([low, high], [place, place], color="#111827", linewidth=1.2)
            axes.annotate(
                f"  {short(row['tokens_per_second'])}",
                (max(row["tokens_per_second"], high or 0), place),
                va="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(right=1.15 * max(max(row["tokens_per_second"], row.get("high") or 0) for row in rows))
        axes.set_xlabel("training tokens per second (right is better)")
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", visible=False)
    return output[0]


def sweep(rows: Sequence[dict[str, Any]], colour: dict[str, str], name: str, axis: str) -> str:
    """Validation loss against the rate `axis`, the lowest of each value; an arm's chosen one is filled."""
    with figure_svg(name, 2.9) as (figure, output):
        axes = figure.add_subplot()
        for row in rows:
            lowest: dict[float, float] = {}
            for trial in row["trials"]:
                if trial["loss"] is not None and trial.get(axis) is not None:
                    lowest[trial[axis]] = min(trial["loss"], lowest.get(trial[axis], np.inf))
            if not lowest:
                continue
            rates = sorted(lowest)
            losses = [lowest[rate] for rate in rates]
            axes.plot(
                rates, losses, "o-", color=colour[row["arm"]], label=row["arm"], markerfacecolor="white"
            )
            if row[axis] in lowest:
                axes.plot([row[axis]], [lowest[row[axis]]], "o", color=colour[row["arm"]])
        axes.set_xscale("log")
        axes.set_xlabel(f"peak {axis.replace('_', ' ')}".replace("kan learning rate", "rate of coefficients"))
        axes.set_ylabel("validation loss, nats per token")
        axes.legend()
    return output[0]


def scaling(series: dict[str, list[tuple[float, float]]], colour: dict[str, str], name: str) -> str:
    """Mean loss against non-embedding parameters, one line an arm."""
    with figure_svg(name, 2.9) as (figure, output):
        axes = figure.add_subplot()
        for arm, points in series.items():
            sizes, losses = zip(*sorted(points), strict=True)
            axes.plot(sizes, losses, "o-", color=colour[arm], label=arm)
        axes.set_xscale("log")
        axes.set_xlabel("non-embedding parameters")
        axes.set_ylabel("loss, nats per token")
        axes.legend()
    return output[0]
