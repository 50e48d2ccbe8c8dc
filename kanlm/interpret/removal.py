"""What the loss is without the learned functions: replaced by their start, a straight line, a formula.

Functions are fitted on one part of the text, the loss is measured on another.

Shapes: B sequences, T tokens, F inputs with functions of their own, O functions of each, I inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm.interpret.layers import CACHED_BYTES, FunctionLayer, replaced, reset_learned_part, short_name
from kanlm.interpret.statistics import FunctionStatistics, sign_flip_p
from kanlm.interpret.symbolic import LIBRARY, NAMES, Formulas
from kanlm.kernels import functions_called

Replacement = Callable[[Tensor], Tensor]


@torch.no_grad()
def sequence_losses(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Mean loss in nats/token of each sequence of tokens [B, T], fp64 [B]."""
    losses = []
    for row in input_ids.split(4):
        logits = model(input_ids=row, use_cache=False).logits[:, :-1].float()  # [b, T - 1, V]
        nll = F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="none")
        losses.append(nll.view(len(row), -1).double().mean(1))
    return torch.cat(losses).cpu()


def start_of(layer: FunctionLayer) -> Replacement:
    """The layer with the functions it had before training."""
    start = copy.deepcopy(layer.module)
    start._forward_hooks.clear()
    reset_learned_part(start)
    return lambda x: start(x)


def lines_of(layer: FunctionLayer, found: FunctionStatistics) -> Replacement:
    """The layer with each function replaced by its best straight line over the inputs it was given."""
    x, y = found.x.unsqueeze(-1), found.y  # [F, Q, 1], [F, Q, O]
    middle, mean = x.mean(1), y.mean(1)  # [F, 1], [F, O]
    slope = ((x - middle.unsqueeze(1)) * y).mean(1) / (x - middle.unsqueeze(1)).square().mean(1).clamp_min(
        1e-12
    )
    intercept = mean - slope * middle  # [F, O]
    if layer.kind == "edge":
        return lambda x: F.linear(x, slope.t(), intercept.sum(0))
    a, d = (part.squeeze(-1).repeat_interleave(layer.size) for part in (slope, intercept))
    return lambda x: a * x + d


class ClosedForms:
    """The layer with the functions of `chosen` [F, O] replaced by their formulas; the others stay learned."""

    def __init__(self, layer: FunctionLayer, forms: Formulas, chosen: Tensor):
        self.kind, self.size, self.outputs = layer.kind, layer.size, layer.outputs
        self.rest = None if chosen.all() else copy.deepcopy(layer.module)
        self.chosen = chosen
        if self.rest is not None:
            self.rest._forward_hooks.clear()
            if self.kind == "edge":
                keep = (~chosen).t().to(self.rest.spline.weight)  # [O, I]
                with torch.no_grad():
                    self.rest.spline.weight.unflatten(-1, (-1, layer.inputs)).mul_(keep.unsqueeze(1))
                    if self.rest.base is not None:
                        self.rest.base.weight.mul_(keep)
        self.parts = []
        for index in forms.name[chosen].unique().tolist():
            place, output = (chosen & (forms.name == index)).nonzero(as_tuple=True)
            numbers = [
                tensor[place, output].float().unsqueeze(1) for tensor in (forms.a, forms.b, forms.c, forms.d)
            ]
            ends = None
            if LIBRARY[NAMES[index]].domain != "everywhere":
                ends = [forms.low[place].float().unsqueeze(1), forms.high[place].float().unsqueeze(1)]
            self.parts.append((LIBRARY[NAMES[index]].function, place, output, numbers, ends))

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        if self.kind != "edge":
            rows = (
                rows.view(len(rows), -1, self.size).transpose(1, 2).reshape(-1, rows.shape[-1] // self.size)
            )
        columns = rows.t().contiguous()  # [F, n]
        total = columns.new_zeros(self.outputs if self.kind == "edge" else len(columns), columns.shape[1])
        for function, place, output, (a, b, c, d), ends in self.parts:
            step = max(1, CACHED_BYTES // (4 * columns.shape[1]))
            for first in range(0, len(place), step):
                part = slice(first, first + step)
                points = columns[place[part]]  # [functions, n]
                if ends is not None:  # beyond the range that was fitted, the formula may not exist
                    points = points.clamp(ends[0][part], ends[1][part])
                y = function(points.mul_(b[part]).add_(c[part])).mul_(a[part]).add_(d[part])
                total.index_add_(0, output[part] if self.kind == "edge" else place[part], y)
        if self.kind == "edge":
            y = total.t().reshape(*x.shape[:-1], -1).to(x.dtype)
            return y if self.rest is None else y + self.rest(x)
        y = total.t().reshape(-1, self.size, total.shape[0]).transpose(1, 2).reshape(x.shape).to(x.dtype)
        if self.rest is None:
            return y
        return torch.where(self.chosen.squeeze(-1).repeat_interleave(self.size), y, self.rest(x))


def removal(
    model: nn.Module,
    layers: Sequence[FunctionLayer],
    replacements: dict[str, dict[str, Replacement]],
    input_ids: Tensor,
    parts: int,
    step: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Loss of `model` and its change where functions are replaced, layer by layer and in all layers at once.

    replacements: by name of a kind ("start", "line", ...) and of a layer. A change has `change` (nats/token)
    and `p`, of the exact sign-flip test on `parts` parts of the text. `step` is called after each.
    """
    base = sequence_losses(model, input_ids)
    modules = {layer.name: layer.module for layer in layers}

    def change(kind: str, names: Sequence[str]) -> dict[str, float | None]:
        with ExitStack() as stack, functions_called(model):
            for name in names:
                stack.enter_context(replaced(modules[name], replacements[kind][name]))
            difference = sequence_losses(model, input_ids) - base
        step()
        pieces = [piece.mean().item() for piece in difference.tensor_split(parts) if len(piece)]
        return {"change": difference.mean().item(), "p": sign_flip_p(pieces)}

    rows = [
        {"module": short_name(name)}
        | {kind: change(kind, [name]) for kind in replacements if name in replacements[kind]}
        for name in modules
    ]
    everywhere = {kind: change(kind, list(replacements[kind])) for kind in replacements}
    return {"loss": base.mean().item(), "layers": rows, "all": everywhere}
