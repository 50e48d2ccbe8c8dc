"""Learned functions of a trained model, as numbers: curves, where their inputs lie, how much each matters.

Shapes: N sampled rows, I inputs, O outputs, C channels, P points, Q quantiles.

A KAN layer is a black box here: y_o = sum_i phi_oi(x_i) is additive, so an input vector that is zero except
for x_i gives phi_oi(x_i) and a constant. Every basis, conditioning and kernel is read the same way, and what
is drawn is what the model computes.

Importance of a function: the variance of its output over real inputs (the "activation norm" of Liu et al.
2024, arXiv:2404.19756, sec. 2.5.1, without its mean, which a later layer can absorb). Nonlinear share: the
part of that variance which the best straight line leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KAN_LAYERS = ("KANLinear", "LearnedFunction")
"""By name: a model loaded with its own code has classes of its own."""
POINTS = 61
QUANTILES = 33
SAMPLED_TOKENS = 2048
SAMPLED_ROWS = 1024
ROWS_AT_ONCE = 8192
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "identity": lambda x: x,
    "zero": torch.zeros_like,
}


def kan_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The KAN layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ in KAN_LAYERS}


def learned_functions(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], per_module: int = 3
) -> dict[str, Any]:
    """functions.json: `curves` of the `per_module` most important functions of every KAN layer, and `layers`.

    A curve has label, module, rank (0 = most important), x and y [P], density [P] of the inputs, and start
    [P] where the function before training is known. A layer has module, functions, share_for_90_percent (of
    its functions, the fewest that carry 90% of the importance), nonlinear_share and outside_grid (share of
    inputs; None where the basis has no grid). Both are empty for a model without KAN layers.
    """
    layers = kan_layers(model)
    result: dict[str, Any] = {"caption": "", "curves": [], "layers": []}
    if not layers:
        return result
    inputs = layer_inputs(model, token_batch(model, tokenizer, texts))
    for name, rows in inputs.items():
        module = layers[name]
        if type(module).__name__ == "KANLinear":
            described = edge_functions(name, module, rows, per_module)
        else:
            described = channel_functions(name, module, rows, per_module)
        result["curves"] += described["curves"]
        result["layers"].append(described["layer"])
    edges = any(type(module).__name__ == "KANLinear" for module in layers.values())
    kind = "edges (output and input are named)" if edges else "groups of channels"
    result["caption"] = f"learned functions of the most important {kind}."
    return result


def token_batch(model: nn.Module, tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """The first SAMPLED_TOKENS tokens of `texts` as [B, T], T at most the model's positions."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= SAMPLED_TOKENS:
            break
    if len(ids) < 2:
        raise ValueError(
            f"texts: got {len(ids)} tokens; learned functions are drawn over the inputs of real text"
        )
    length = min(256, model.config.max_position_embeddings, len(ids))
    count = min(SAMPLED_TOKENS, len(ids)) // length
    device = next(model.parameters()).device
    return torch.tensor(ids[: count * length], device=device).view(count, length)


@torch.no_grad()
def layer_inputs(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    """Inputs [N, I] of every KAN layer for tokens [B, T], in the order of calls; N <= SAMPLED_ROWS, fp32."""
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        rows = x.detach().float().reshape(-1, x.shape[-1])
        step = max(1, len(rows) // SAMPLED_ROWS)
        found[name] = rows[::step][:SAMPLED_ROWS]

    with _watched(kan_layers(model), keep):
        model(input_ids=input_ids, use_cache=False)
    return found


@contextmanager
def _watched(layers: dict[str, nn.Module], keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`keep(name, x)` whenever a layer is called; `gated` is a second entrance, which hooks do not see."""
    handles = []
    gated = {}
    for name, module in layers.items():
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        if hasattr(module, "gated"):
            original = module.gated

            def watched(a: Tensor, u: Tensor, name: str = name, original: Callable = original) -> Tensor:
                keep(name, a)
                return original(a, u)

            gated[name] = module
            module.gated = watched
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in gated.values():
            del module.gated


def middle_quantiles(rows: Tensor) -> Tensor:
    """[N, I] to [Q, I]: the middles of Q equally likely parts of each column."""
    levels = (torch.arange(QUANTILES, device=rows.device) + 0.5) / QUANTILES
    return torch.quantile(rows, levels, dim=0)


@torch.no_grad()
def edge_values(layer: nn.Module, points: Tensor) -> Tensor:
    """phi_oi(points[p, i]) - phi_oi(0) for points [P, I], as [I, P, O]."""
    count, inputs = points.shape
    weight = next(layer.parameters())
    zero = layer(torch.zeros(1, inputs, device=weight.device, dtype=weight.dtype)).float()
    at_once = max(1, ROWS_AT_ONCE // count)
    pieces = []
    for first in range(0, inputs, at_once):
        chosen = torch.arange(first, min(first + at_once, inputs), device=points.device)
        x = points.new_zeros(len(chosen), count, inputs)
        x[torch.arange(len(chosen)), :, chosen] = points[:, chosen].t()
        pieces.append(layer(x.to(weight)).float() - zero)
    return torch.cat(pieces)


def importance_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x, y [..., Q] at equally likely inputs; variance of y, and what the best line in x leaves of it."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    variance = y.square().mean(-1)
    explained = (x * y).mean(-1).square() / x.square().mean(-1).clamp_min(1e-12)
    return variance, (variance - explained).clamp_min(0)


def layer_row(name: str, module: nn.Module, rows: Tensor, variance: Tensor, left: Tensor) -> dict[str, Any]:
    ordered = variance.flatten().sort(descending=True).values.double()
    total = ordered.sum()
    needed = int((ordered.cumsum(0) < 0.9 * total).sum()) + 1 if total > 0 else 0
    low, high = (getattr(module.basis, bound, None) for bound in ("grid_min", "grid_max"))
    outside = None if low is None else ((rows < low) | (rows > high)).float().mean().item()
    return {
        "module": short_name(name),
        "kind": type(module).__name__,
        "functions": variance.numel(),
        "importance": total.item(),
        "share_for_90_percent": needed / variance.numel(),
        "nonlinear_share": (left.sum() / total).item() if total > 0 else 0.0,
        "outside_grid": outside,
    }


def short_name(name: str) -> str:
    """model.layers.3.mlp.down_proj -> layer 3 down_proj."""
    parts = name.split(".")
    if "layers" in parts:
        place = parts.index("layers")
        return f"layer {parts[place + 1]} {parts[-1]}"
    return name


def density_at(points: Tensor, inputs: Tensor) -> list[float]:
    """Share of `inputs` nearest to each of the evenly spaced `points`, over its largest value."""
    step = float(points[1] - points[0])
    low = float(points[0]) - step / 2
    counts = torch.histc(inputs.cpu(), len(points), min=low, max=low + len(points) * step)
    return rounded(counts / counts.max().clamp_min(1))


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def drawn_range(inputs: Tensor) -> Tensor:
    """P points over the middle 99% of the inputs."""
    sample = inputs.flatten()
    sample = sample[:: max(1, len(sample) // 100_000)]
    low, high = torch.quantile(sample, torch.tensor([0.005, 0.995], device=sample.device)).tolist()
    if high - low < 1e-6:
        low, high = low - 1.0, high + 1.0
    return torch.linspace(low, high, POINTS, device=inputs.device)


def edge_functions(name: str, layer: nn.Module, rows: Tensor, per_module: int) -> dict[str, Any]:
    """Curves of the most important edges of a KANLinear, each of another input, and the layer's row."""
    quantiles = middle_quantiles(rows)  # [Q, I]
    values = edge_values(layer, quantiles)  # [I, Q, O]
    x = quantiles.t().unsqueeze(1)  # [I, 1, Q]
    variance, left = importance_of(x, values.transpose(1, 2))  # [I, O]
    best_output = variance.argmax(dim=1)  # [I]
    chosen = variance.max(dim=1).values.argsort(descending=True)[:per_module].tolist()
    curves = []
    for rank, i in enumerate(chosen):
        points = drawn_range(rows[:, i])
        grid = torch.zeros(POINTS, rows.shape[1], device=rows.device)
        grid[:, i] = points
        with torch.no_grad():
            weight = next(layer.parameters())
            origin = layer(torch.zeros_like(grid[:1]).to(weight))
            y = (layer(grid.to(weight)) - origin)[:, best_output[i]].float()
        curves.append(
            {
                "label": f"{short_name(name)} [{best_output[i].item()}, {i}]",
                "module": short_name(name),
                "rank": rank,
                "x": rounded(points),
                "y": rounded(y),
                "density": density_at(points, rows[:, i]),
                "start": None,
            }
        )
    return {"curves": curves, "layer": layer_row(name, layer, rows, variance, left)}


@torch.no_grad()
def channel_functions(name: str, layer: nn.Module, rows: Tensor, per_module: int) -> dict[str, Any]:
    """Curves of the most important groups of a LearnedFunction, and the layer's row."""
    size = layer.channels // layer.groups
    by_group = (
        rows.view(len(rows), layer.groups, size).transpose(1, 2).reshape(-1, layer.groups)
    )  # [N size, groups]
    by_group = by_group[:: max(1, len(by_group) // 65_536)]
    dtype = next(layer.parameters()).dtype

    def values(points: Tensor) -> Tensor:
        """phi of every group at points [P, groups], as [P, groups]."""
        spread = points.repeat_interleave(size, dim=1)
        return layer(spread.to(dtype)).float()[:, ::size]

    quantiles = middle_quantiles(by_group)  # [Q, groups]
    variance, left = importance_of(quantiles.t(), values(quantiles).t())  # [groups]
    curves = []
    for rank, group in enumerate(variance.argsort(descending=True)[:per_module].tolist()):
        points = drawn_range(by_group[:, group])
        y = values(points.unsqueeze(1).expand(-1, layer.groups).contiguous())[:, group]
        start = STARTS[layer.initial](points)
        if layer.base == "silu":
            start = start + F.silu(points)
        curves.append(
            {
                "label": f"{short_name(name)} group {group}",
                "module": short_name(name),
                "rank": rank,
                "x": rounded(points),
                "y": rounded(y),
                "density": density_at(points, by_group[:, group]),
                "start": rounded(start),
            }
        )
    return {"curves": curves, "layer": layer_row(name, layer, rows, variance, left)}
