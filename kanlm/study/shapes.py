"""What the functions that several runs learned have in common, from the functions.json of a study."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kanlm.model.basis import INITIAL_FUNCTIONS
from kanlm.runs import read_json
from kanlm.study.figures import functions
from kanlm.study.plan import StudyFolder

WITHIN = 3.5
"""Inputs to here are where learned functions are compared."""
ABOUT_SHAPES = (
    "Of each layer the mean function, in all runs of the phases `picture` and `picture-...`. Spread: its "
    f"standard deviation over runs, the largest at any input from -{WITHIN} to {WITHIN}. Share of the wave: "
    "of the squared difference to GELU, weighted as normal inputs, what GELU(x) - 0.4 (x + 0.7) "
    "exp(-(x + 0.7)^2 / 2) has. From the first text's: how far the mean over runs is from that of the first "
    "text, the most at any such input."
)
HEAD = "| text | layer | runs | spread | share of the wave | from the first text's |"


def learned_functions(study: StudyFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """What runs have in common, and the text of the picture and of that."""
    measured = read_json(study.functions)
    drawn = functions(measured, study.path / "functions.svg")
    shapes = in_common(measured["x"], measured["runs"])
    rows = [
        f"| {one['corpus']} | {one['layer']} | {one['runs']} | {spread_of(one)} | {one['of_the_wave']:.2f} | "
        f"{one['from_first']:.3f} |"
        for one in shapes
    ]
    return shapes, [
        f"![learned functions by layer and group, dotted where they began, in grey their inputs]({drawn})",
        "The first run of the phase `picture` (functions.json): a row for each layer, a column for each "
        "group of its channels, from -4 to 4; dotted the start; in grey the density of the inputs.",
        ABOUT_SHAPES,
        "\n".join((HEAD, "|---|--:|--:|--:|--:|--:|", *rows)),
    ]


def in_common(x: list[float], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each text and layer what the mean functions `means` [layers, points] of its runs have in common."""
    points = torch.tensor(x, dtype=torch.float64)
    gelu, wave = (INITIAL_FUNCTIONS[name](points).numpy() for name in ("gelu", "gelu_wave"))
    weights, inside = np.exp(-0.5 * np.square(x)), np.abs(x) <= WITHIN
    by_text = {
        corpus: [run["means"] for run in runs if run["corpus"] == corpus]
        for corpus in dict.fromkeys(run["corpus"] for run in runs)
    }
    first = np.mean(next(iter(by_text.values())), axis=0)
    found = []
    for corpus, means in by_text.items():
        middle = np.mean(means, axis=0)
        spread = np.std(means, axis=0, ddof=1) if len(means) > 1 else None
        for layer, shape in enumerate(middle):
            left = weights @ np.square(shape - wave) / (weights @ np.square(shape - gelu))
            found.append(
                {
                    "corpus": corpus,
                    "layer": layer,
                    "runs": len(means),
                    "spread": None if spread is None else round(float(spread[layer][inside].max()), 6),
                    "of_the_wave": round(float(1 - left), 6),
                    "from_first": round(float(np.abs(shape - first[layer])[inside].max()), 6),
                }
            )
    return found


def spread_of(one: dict[str, Any]) -> str:
    return "" if one["spread"] is None else f"{one['spread']:.3f}"
