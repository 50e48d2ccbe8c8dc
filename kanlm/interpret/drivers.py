"""Which tokens, with their context, drive a function: where its output lies furthest from its mean.

Shapes: N tokens, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kanlm.interpret.layers import FunctionLayer
from kanlm.interpret.statistics import function_outputs

BEFORE, AFTER = 12, 4
"""Tokens of context that are shown."""


@torch.no_grad()
def drivers(
    layer: FunctionLayer, indices: Sequence[int], input_ids: Tensor, tokenizer: Any, count: int = 4
) -> list[dict[str, Any]]:
    """For each function the tokens at which it is highest and lowest, no two alike: `high` and `low`.

    A driver has before, token, after (text), value (the output less its mean, of the channel where it is
    furthest), and layers whose functions are shared by channels look at all of them.
    """
    ids = input_ids.flatten().tolist()
    length = input_ids.shape[1]
    found = []
    for index, outputs in zip(
        indices, function_outputs(layer, indices).unbind(1), strict=True
    ):  # [N, channels]
        moved = outputs - outputs.mean(0)
        entry: dict[str, Any] = {"label": layer.label(index)}
        for name, extreme in (("high", moved.amax(1)), ("low", moved.amin(1))):
            order = extreme.argsort(descending=name == "high").tolist()
            picked: list[int] = []
            for place in order[:2000]:
                if all(ids[place] != ids[other] for other in picked):
                    picked.append(place)
                if len(picked) == count:
                    break
            entry[name] = [
                {**context(ids, place, length, tokenizer), "value": float(f"{extreme[place]:.4g}")}
                for place in picked
            ]
        found.append(entry)
    return found


def context(ids: Sequence[int], place: int, length: int, tokenizer: Any) -> dict[str, str]:
    """Text before, at and after the token at `place`, of its own sequence."""
    first = place // length * length
    last = min(len(ids), first + length)
    parts = {
        "before": ids[max(first, place - BEFORE) : place],
        "token": ids[place : place + 1],
        "after": ids[place + 1 : min(last, place + 1 + AFTER)],
    }
    return {name: tokenizer.decode(part) if part else "" for name, part in parts.items()}
