"""Smaller models: hidden channels taken out of every feed-forward block, or single edges set to zero.

Shapes: N tokens, D hidden_size, h intermediate_size, K basis functions, O outputs.

A hidden channel goes with all that makes it and all that reads it, so the model that is left is an ordinary
one of a smaller intermediate_size, with fewer parameters and faster steps. All blocks keep equally many, as
one intermediate_size says; where channels share learned functions, each group keeps equally many.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm.interpret.layers import KIND, FunctionLayer, function_values, kan_layers, record_layers
from kanlm.interpret.statistics import first_order_effect

Rule = Literal["importance", "random"]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The feed-forward blocks of `model` that have an `up_proj` and a `down_proj`, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "up_proj") and hasattr(module, "down_proj")
    }


def checked_keep(keep: float) -> float:
    """
    Raises:
        ValueError: keep outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: the share that stays lies in (0, 1], got {keep:g}; 0.8 takes out a fifth")
    return keep


def channel_importance(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """For every block how far the loss on tokens [B, T] moves, to first order, without each channel: [h].

    Root mean square over tokens of sum_o g_o phi_oj(x_j): g the gradient by the block's output, phi_oj(x_j)
    what channel j adds to output o, a weight times x_j in an MLP.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def make_hook(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    found = blocks(model)
    handles = [block.down_proj.register_forward_hook(make_hook(name)) for name, block in found.items()]
    try:
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    with torch.no_grad():
        for name, gradient in zip(outputs, gradients, strict=True):
            layer, x = found[name].down_proj, inputs[name].flatten(0, -2).float()
            g = gradient.flatten(0, -2).float()
            if type(layer).__name__ not in KIND:
                moved = (g @ layer.weight.float()) * x  # [N, h]
                result[name] = moved.square().mean(0).sqrt()
                continue
            total = x.new_zeros(x.shape[1])
            for rows, part in zip(x.split(128), g.split(128), strict=True):
                total += torch.einsum("hno,no->hn", function_values(layer, rows), part).square().sum(1)
            result[name] = (total / len(x)).sqrt()
    return result


def kept_channels(scores: Tensor, keep: float, groups: int) -> Tensor:
    """Places, ascending, of the best channels: round(keep size) of each of `groups` runs, at least one."""
    size = len(scores) // groups
    number = max(1, round(keep * size))
    best = scores.view(groups, size).topk(number, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(groups, device=scores.device).unsqueeze(1) * size).flatten()


def hidden_groups(block: nn.Module) -> int:
    """Groups of the block's hidden channels that share a learned function; 1 where there is none."""
    hidden = block.down_proj.in_features
    functions = [
        module
        for name, module in block.named_modules()
        if KIND.get(type(module).__name__) == "group" and module.channels == hidden and name != "phi_in"
    ]
    return functions[0].groups if functions else 1


def prune_channels(
    model: Any, input_ids: Tensor, keep: float, rule: Rule = "importance", seed: int = 0
) -> tuple[Any, dict[str, Tensor]]:
    """A model with the share `keep` of each block's hidden channels, and which channels they were.

    rule: the most important on tokens [B, T] (`channel_importance`), or random ones.

    Raises:
        ValueError: keep outside (0, 1], no blocks, or groups of single channels, which cannot shrink.
    """
    checked_keep(keep)
    found = blocks(model)
    if not found:
        raise ValueError(f"{type(model).__name__}: no feed-forward blocks; looked for up_proj and down_proj")
    if rule == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: torch.rand(block.down_proj.in_features, generator=generator)
            for name, block in found.items()
        }
    else:
        scores = channel_importance(model, input_ids)
    places = {}
    for name, block in found.items():
        groups = hidden_groups(block)
        if groups == len(scores[name]) > 1 and keep < 1:
            raise ValueError(
                f"kan_num_groups: {groups} functions for {groups} hidden channels leave nothing to take out "
                "of a group; prune a model whose channels share functions"
            )
        places[name] = kept_channels(scores[name].cpu(), keep, groups)
    config = copy.deepcopy(model.config)
    config.intermediate_size = len(next(iter(places.values())))
    weights = dict(model.state_dict())
    for name, kept in places.items():
        hidden = found[name].down_proj.in_features
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            weights[key] = cut(key.removeprefix(f"{name}."), weights[key], kept, hidden)
    small = type(model)(config).to(next(model.parameters()).dtype)
    small.load_state_dict(weights)
    small.generation_config = copy.deepcopy(model.generation_config)
    small.tie_weights()
    return small.eval(), places


def cut(key: str, tensor: Tensor, kept: Tensor, hidden: int) -> Tensor:
    """What is left of a block's tensor: rows of what makes hidden channels, columns of what reads them."""
    if re.fullmatch(r"(gate|up)_proj\.(weight|bias|spline\.weight|base\.weight)", key):
        return tensor[kept]
    if key == "down_proj.spline.weight":
        return tensor.unflatten(-1, (-1, hidden))[:, :, kept].flatten(1)
    if key in ("down_proj.weight", "down_proj.base.weight"):
        return tensor[:, kept]
    return tensor


@torch.no_grad()
def without_edges(
    model: Any, input_ids: Tensor, keep: float, rule: Rule = "importance", seed: int = 0
) -> Any:
    """A copy of `model` in which only the share `keep` of each layer's edges is not zero.

    The model is as large and as fast as before: what it shows is how many functions matter.

    Raises:
        ValueError: keep outside (0, 1], or no layers of edge functions.
    """
    checked_keep(keep)
    twin = copy.deepcopy(model)
    layers = {name: m for name, m in kan_layers(twin).items() if KIND[type(m).__name__] == "edge"}
    if not layers:
        raise ValueError(f"{type(model).__name__}: has no edge functions to prune; prune channels instead")
    recordings: dict[str, FunctionLayer] = {}
    with torch.enable_grad():
        recordings = {layer.name: layer for layer in record_layers(twin, input_ids)}
    generator = torch.Generator().manual_seed(seed)
    for name, module in layers.items():
        score = first_order_effect(recordings[name])  # [I, O]
        assert score is not None
        if rule == "random":
            score = torch.rand(score.shape, generator=generator)
        number = max(1, round(keep * score.numel()))
        stays = torch.zeros(score.numel(), dtype=torch.bool)
        stays[score.flatten().topk(number).indices.cpu()] = True
        mask = stays.view_as(score).t().to(module.spline.weight)  # [O, I]
        module.spline.weight.unflatten(-1, (-1, module.in_features)).mul_(mask.unsqueeze(1))
        if module.base is not None:
            module.base.weight.mul_(mask)
    return twin
