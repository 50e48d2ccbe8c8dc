"""Learned functions of a trained model as numbers for a report: curves, where their inputs lie, importance.

Shapes: P points, F inputs with functions of their own, O functions of each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kanlm.interpret.layers import (
    FunctionLayer,
    function_values,
    kan_layers,
    record_layers,
    reset_learned_part,
    short_name,
)
from kanlm.interpret.statistics import FunctionStatistics, function_statistics, share_for_90_percent

POINTS = 61
SAMPLED_TOKENS = 2048
LENGTH = 256


def learned_functions(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], per_module: int = 3
) -> dict[str, Any]:
    """functions.json: `curves` of the `per_module` most important functions of every KAN layer, and `layers`.

    A curve has label, module, rank (0 = most important), x and y [P], density [P] of the inputs, and start
    [P], the function before training. A layer has module, functions, share_for_90_percent (of its functions,
    the fewest that carry 90% of the importance), nonlinear_share and outside_grid (share of inputs; None
    where the basis has no grid). Both are empty for a model without KAN layers.
    """
    result: dict[str, Any] = {"caption": "", "curves": [], "layers": []}
    layers = kan_layers(model)
    if not layers:
        return result
    batch = token_batch(model, tokenizer, texts)
    for layer in record_layers(model, batch, gradients=False):
        if layer.name not in layers:
            continue
        found = function_statistics(layer)
        result["curves"] += curves(layer, found, per_module)
        result["layers"].append(layer_row(layer, found))
    edges = any(row["kind"] == "KANLinear" for row in result["layers"])
    kind = "edges (output and input are named)" if edges else "groups of channels"
    result["caption"] = f"learned functions of the most important {kind}."
    return result


def token_ids(tokenizer: Any, texts: Iterable[str], count: int) -> list[int]:
    """The first `count` ids of `texts`.

    Raises:
        ValueError: fewer than two.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        if len(ids) >= count:
            break
    if len(ids) < 2:
        raise ValueError(
            f"texts: got {len(ids)} tokens; learned functions are drawn over the inputs of real text"
        )
    return ids[:count]


def token_batch(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], count: int = SAMPLED_TOKENS, rows: int = 1
) -> Tensor:
    """The first `count` tokens of `texts`, [B, T]: T at most the model's positions, B divisible by `rows`."""
    ids = token_ids(tokenizer, texts, count)
    positions = getattr(model.config, "max_position_embeddings", LENGTH)
    length = max(1, min(LENGTH, positions, len(ids) // rows))
    number = len(ids) // length // rows * rows
    device = next(model.parameters()).device
    return torch.tensor(ids[: number * length], dtype=torch.int64, device=device).view(number, length)


def layer_row(layer: FunctionLayer, found: FunctionStatistics) -> dict[str, Any]:
    total = found.variance.sum().item()
    return {
        "module": short_name(layer.name),
        "kind": type(layer.module).__name__,
        "functions": layer.functions,
        "importance": total,
        "share_for_90_percent": share_for_90_percent(found.variance),
        "nonlinear_share": found.left.sum().item() / total if total > 0 else 0.0,
        "outside_grid": found.outside_grid,
    }


def most_important(found: FunctionStatistics, count: int) -> list[int]:
    """Places in [F, O], flattened, of the most important functions, each of another input, best first."""
    variance, output = found.variance.max(dim=1)
    places = variance.argsort(descending=True)[:count]
    return (places * found.variance.shape[1] + output[places]).tolist()


@torch.no_grad()
def curves(
    layer: FunctionLayer, found: FunctionStatistics, count: int = 0, indices: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The `count` most important functions, each of another input, or those at `indices` of [F, O].

    They are drawn over the middle 99% of their inputs.
    """
    chosen = most_important(found, count) if indices is None else indices
    samples = layer.samples()
    few = samples[:: max(1, len(samples) // 16_384)]
    ends = torch.quantile(few, torch.tensor([0.005, 0.995], device=few.device), dim=0)  # [2, F]
    ends[:, (ends[1] - ends[0]) < 1e-6] += torch.tensor([[-1.0], [1.0]], device=few.device)
    steps = torch.linspace(0, 1, POINTS, device=few.device).unsqueeze(1)
    points = ends[0] + (ends[1] - ends[0]) * steps  # [P, F]
    start = copy.deepcopy(layer.module)
    if layer.kind != "channel":
        reset_learned_part(start)
    values, before = layer.values(points), function_values(start, points)  # [F, P, O]
    total = found.variance.sum().item()
    result = []
    for rank, index in enumerate(chosen):
        place, output = divmod(index, layer.outputs)
        result.append(
            {
                "label": layer.label(index),
                "module": short_name(layer.name),
                "rank": rank,
                "index": index,
                "share": found.variance.flatten()[index].item() / total if total > 0 else 0.0,
                "x": rounded(points[:, place]),
                "y": rounded(values[place, :, output]),
                "density": density_at(points[:, place], samples[:, place]),
                "start": rounded(before[place, :, output]),
            }
        )
    return result


def density_at(points: Tensor, inputs: Tensor) -> list[float]:
    """Share of `inputs` nearest to each of the evenly spaced `points`, over its largest value."""
    step = float(points[1] - points[0])
    low = float(points[0]) - step / 2
    counts = torch.histc(inputs.cpu(), len(points), min=low, max=low + len(points) * step)
    return rounded(counts / counts.max().clamp_min(1))


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
