"""A study's figures, from what its report says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kanlm.interpret.pictures import figure_svg
from kanlm.stats import Rung, ScalingFit

KAN, MLP = "#c2410c", "#374151"
EDGE = 0.07
"""Of the differences' axis, in nats a token."""


def forest(judged: Sequence[dict[str, Any]], folder: Path) -> str:
    """Differences of arms to their baseline with intervals, a line for each phase; the file's name."""
    rows = [one for one in judged if one["interval_nats"]]
    with figure_svg("study-differences", 0.8 + 0.24 * len(rows)) as (figure, output):
        axes = figure.add_subplot()
        for place, one in enumerate(reversed(rows)):
            low, high = one["interval_nats"]
            colour = KAN if one["outcome"] == "better" else MLP
            # A wide interval is cut: its line goes through the frame. A mean outside it is an arrow there.
            axes.plot([low, high], [place, place], color=colour, clip_on=True)
            inside = min(max(one["difference_nats"], -EDGE), EDGE)
            marker = {-EDGE: "<", EDGE: ">"}.get(inside, "o")
            axes.plot(inside, place, marker, color=colour, markersize=4, clip_on=False)
        axes.axvline(0, color=MLP, linewidth=1)
        axes.set_yticks(range(len(rows)), [f"{one['phase']} ({one['seeds']})" for one in reversed(rows)])
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlim(-EDGE, EDGE)
        axes.set_xlabel("test loss less the MLP's, nats a token; left: the KAN is better", loc="right")
    return written(folder / "differences.svg", output)


def ladder(rungs: Sequence[Rung], laws: tuple[ScalingFit, ScalingFit], path: Path) -> str:
    """Losses at each size, a dot for each seed, and the fitted power laws; the file's name."""
    with figure_svg("study-ladder", 3.3) as (figure, output):
        axes = figure.add_subplot()
        for name, colour, law in (("KAN", KAN, laws[0]), ("MLP", MLP, laws[1])):
            sizes = [rung.size if name == "KAN" else rung.other_size for rung in rungs]
            losses = [rung.losses if name == "KAN" else rung.other_losses for rung in rungs]
            for size, own in zip(sizes, losses, strict=True):
                axes.plot([size] * len(own), own, "o", color=colour, markersize=3.5, alpha=0.8)
            between = np.geomspace(min(sizes), max(sizes), 60)
            axes.plot(between, [law.loss(size) for size in between], color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("parameters without embeddings")
        axes.set_ylabel("test loss, nats a token")
        axes.legend()
    return written(path, output)


def functions(measured: dict[str, Any], path: Path) -> str:
    """Learned functions by layer and group, where they began, and their inputs; the file's name."""
    layers, x = measured["layers"], measured["x"]
    groups = max(len(layer["groups"]) for layer in layers)
    with figure_svg("study-functions", 0.7 * len(layers)) as (figure, output):
        grid = figure.subplots(len(layers), groups, squeeze=False)
        for place, (row, layer) in enumerate(zip(grid, layers, strict=True)):
            for axes, group in zip(row, layer["groups"], strict=True):
                bins = np.linspace(x[0], x[-1], len(group["density"]) + 1)
                axes.stairs(group["density"], bins, fill=True, color="#d4d4dc")
                axes.plot(x, group["start"], ":", color=MLP, linewidth=0.8)
                axes.plot(x, group["learned"], color=KAN, linewidth=1.1)
                axes.set(xlim=(x[0], x[-1]), ylim=(-1.2, 3.2), xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color="#e5e7eb")
            row[0].set_ylabel(f"layer {place}", fontsize=7)
    return written(path, output)


def written(path: Path, output: list[str]) -> str:
    """Writes the figure on white, so that a dark page shows it too."""
    (svg,) = output
    path.write_text(svg.replace("<svg ", '<svg style="background:white" ', 1) + "\n", encoding="utf-8")
    return path.name
