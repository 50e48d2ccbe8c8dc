"""matplotlib figures as inline SVG, narrow enough to be read on a phone; pictures of learned functions.

Text stays text (searchable, in the page's font), and the same values give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 5.0
"""Inches of every figure: 360 pt, a phone's width, so that 9 pt text stays 9 pt there."""


@contextmanager
def figure_svg(name: str, height: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of WIDTH x height inches; its SVG text is appended to the list when the block ends."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9ca3af",
        "axes.labelcolor": "#374151",
        "xtick.color": "#4b5563",
        "ytick.color": "#4b5563",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e5e7eb",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        output: list[str] = []
        yield figure, output
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{name}"', svg, count=1)
    svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    output.append(svg.strip())


def standalone_svg(svg: str) -> str:
    """An inline picture as a file: a white ground and a size of its own."""
    opening, rest = svg.split(">", 1)
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n{opening} width="{1.6 * 72 * WIDTH:.0f}">{ground}{rest}\n'
    )


def spread(curves: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` curves: the most important of every layer first, the layers spaced evenly, in order."""
    ordered = sorted(range(len(curves)), key=lambda index: (curves[index]["rank"], index))
    if len({curve["module"] for curve in curves}) > count:
        best = [index for index in ordered if curves[index]["rank"] == 0]
        ordered = [best[round(place * (len(best) - 1) / max(1, count - 1))] for place in range(count)]
    return [curves[index] for index in sorted(ordered[:count])]


def learned_functions_svg(curves: Sequence[dict[str, Any]], colour: str, name: str, columns: int = 3) -> str:
    """Small multiples of learned functions; grey: where the inputs lie; dotted: before training, if known."""
    with figure_svg(name, _height(curves, columns)) as (figure, output):
        draw_learned_functions(figure, curves, colour, columns)
    return output[0]


def learned_functions_pixels(curves: Sequence[dict[str, Any]], colour: str, columns: int = 3) -> np.ndarray:
    """The same picture as pixels [height, width, RGB], uint8."""
    figure = Figure(figsize=(WIDTH, _height(curves, columns)), layout="constrained", dpi=120)
    canvas = FigureCanvasAgg(figure)
    draw_learned_functions(figure, curves, colour, columns)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _height(curves: Sequence[dict[str, Any]], columns: int) -> float:
    return 0.35 + 1.35 * -(-len(curves) // columns)


def draw_learned_functions(
    figure: Figure, curves: Sequence[dict[str, Any]], colour: str, columns: int
) -> None:
    rows = -(-len(curves) // columns)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(rows, columns, index + 1)
        x, y = np.asarray(curve["x"]), np.asarray(curve["y"])
        if curve.get("density"):
            behind = axes.twinx()
            behind.fill_between(x, curve["density"], color="#d1d5db", alpha=0.7, linewidth=0)
            behind.set_ylim(0, 2.2 * max(curve["density"]))
            behind.set_axis_off()
            behind.set_zorder(0)
            axes.set_zorder(1)
            axes.patch.set_visible(False)
        if curve.get("start"):
            axes.plot(x, curve["start"], ":", color="#6b7280", linewidth=1)
        axes.plot(x, y, color=colour, linewidth=1.5)
        axes.set_title(curve["label"], fontsize=7, color="#374151", pad=2)
        axes.tick_params(labelsize=7, length=2, pad=1)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3))
