"""The functions of a model, whatever its arm: where they are, what they are given, what the loss says.

Shapes: N tokens, I inputs, O outputs, C channels, P points, F inputs with functions of their own.

Three kinds of layers hold functions of one variable:

edge      KANLinear: a function phi_oi for every pair of an input and an output, y_o = sum_i phi_oi(x_i);
group     LearnedFunction: a function for every group of neighbouring channels;
channel   the activation of an MLP: one and the same function, but each channel has inputs of its own.

All are read as a matrix of functions: F inputs, each with `outputs` functions of it. A group has one input,
the values of all its channels together, and one output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kanlm.kernels import functions_called

KIND = {"KANLinear": "edge", "AdaptiveKAN": "edge", "LearnedFunction": "group", "FixedFunction": "channel"}
"""By name: a model loaded with its own code has classes of its own."""
ACTIVATIONS = ("activation", "act_fn", "act")
"""Attributes under which feed-forward blocks hold their activation: kanlm's, Llama's, GPT-2's."""
CACHED_BYTES = 2 * 2**20
"""Size of the values of functions that are worked on at once; a processor's cache holds them."""


class FixedFunction(nn.Module):
    """The activation of an MLP as a module, so that hooks see its input and output."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def kan_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of learned functions of `model` by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if KIND.get(type(module).__name__) in ("edge", "group")
    }


def function_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of functions of `model` by name; an activation that works channel by channel becomes one."""
    for module in list(model.modules()):
        for name in ACTIVATIONS:
            function = getattr(module, name, None)
            if not callable(function) or type(function).__name__ in KIND or not _is_feed_forward(module):
                continue
            if _is_elementwise(function):
                module._modules.pop(name, None)
                module.__dict__.pop(name, None)
                setattr(module, name, FixedFunction(function))
    return {name: module for name, module in model.named_modules() if type(module).__name__ in KIND}


def _is_feed_forward(module: nn.Module) -> bool:
    """Experts, whose matrices are one parameter, are none: each sees some of the tokens."""
    return any(isinstance(getattr(module, name, None), nn.Module) for name in ("down_proj", "c_proj", "fc2"))


@torch.no_grad()
def _is_elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """PolyNorm, for one, is not: it divides by a norm over the channels."""
    row = torch.linspace(-2, 2, 8).unsqueeze(0)
    try:
        whole, first = function(row), function(row[:, :1])
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(whole, Tensor) and whole.shape == row.shape and torch.allclose(whole[:, :1], first)


@dataclass
class FunctionLayer:
    """A layer with what one batch of text gave it.

    x [N, I or C]: its inputs. factor [N, C]: what its output was multiplied by, of a gate. gradient [N, O or
    C]: of the sum of the loss over the batch, by the layer's output (times the factor, where there is one).
    """

    name: str
    module: nn.Module
    x: Tensor
    factor: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def kind(self) -> str:
        return KIND[type(self.module).__name__]

    @property
    def size(self) -> int:
        """Channels that share a function."""
        return self.module.channels // self.module.groups if self.kind == "group" else 1

    @property
    def inputs(self) -> int:
        """F: inputs with functions of their own."""
        return self.x.shape[-1] // self.size

    @property
    def outputs(self) -> int:
        """Functions of each input."""
        return self.module.out_features if self.kind == "edge" else 1

    @property
    def functions(self) -> int:
        return self.inputs * self.outputs

    def samples(self) -> Tensor:
        """What each input was given, [S, F]."""
        if self.size == 1:
            return self.x
        return self.x.view(len(self.x), self.inputs, self.size).transpose(1, 2).reshape(-1, self.inputs)

    def values(self, points: Tensor) -> Tensor:
        """The functions at points [P, F], as [F, P, outputs]."""
        return function_values(self.module, points)

    def label(self, index: int) -> str:
        """Name of the function at place `index` of [F, outputs], flattened."""
        place, output = divmod(index, self.outputs)
        suffix = {"edge": f"[{output}, {place}]", "group": f"group {place}", "channel": f"channel {place}"}
        return f"{short_name(self.name)} {suffix[self.kind]}"


@torch.no_grad()
def function_values(module: nn.Module, points: Tensor) -> Tensor:
    """Functions of a layer at points [P, F], as [F, P, outputs]; phi_oi(x) = w_oi silu(x) + spline_oi(x)."""
    kind = KIND[type(module).__name__]
    if kind == "channel":
        return module(points).float().t().unsqueeze(-1)
    if kind == "group":
        size = module.channels // module.groups
        spread = points.repeat_interleave(size, dim=1)
        return module(spread.to(module.coefficients.dtype)).float()[:, ::size].t().unsqueeze(-1)
    features, coefficients = edge_expansion(module, points)
    return torch.bmm(features.permute(2, 0, 1), coefficients.permute(2, 1, 0).contiguous())  # [I, P, O]


@torch.no_grad()
def edge_expansion(module: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """Features [P, K, I] of a KANLinear at points [P, I], coefficients [O, K, I]; its base counts as one."""
    features = module.features(points).float()
    coefficients = module.spline.weight.float().unflatten(-1, (-1, module.in_features))
    if module.base is not None:
        features = torch.cat([features, F.silu(points).float().unsqueeze(1)], dim=1)
        coefficients = torch.cat([coefficients, module.base.weight.float().unsqueeze(1)], dim=1)
    return features, coefficients


def short_name(name: str) -> str:
    """model.layers.3.mlp.down_proj -> layer 3 down_proj."""
    parts = name.split(".")
    for holder in ("layers", "h"):
        if holder in parts:
            place = parts.index(holder)
            return f"layer {parts[place + 1]} {parts[-1]}"
    return name


def record_layers(model: nn.Module, input_ids: Tensor, gradients: bool = True) -> list[FunctionLayer]:
    """The layers of functions of `model` in the order of their calls, on tokens [B, T].

    Raises:
        ValueError: layers that do not see each token once, as those of a mixture of experts.
    """
    seen: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            factor = args[1] if len(args) > 1 else None
            seen[name] = (args[0].detach(), None if factor is None else factor.detach(), output)

        return hook

    layers = function_layers(model)
    handles = [module.register_forward_hook(make_hook(name)) for name, module in layers.items()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:  # gradients by activations alone
            parameter.requires_grad_(False)
        embeddings = model.get_input_embeddings()(input_ids).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients), functions_called(model):
            logits = model(inputs_embeds=embeddings, use_cache=False).logits
            found: tuple[Tensor | None, ...] = (None,) * len(seen)
            if gradients:
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="sum"
                )
                outputs = [output for _, _, output in seen.values()]
                found = torch.autograd.grad(loss, outputs, allow_unused=True)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()

    if any(x[..., 0].numel() != input_ids.numel() for x, _, _ in seen.values()):
        raise ValueError("a block does not see each token once; mixtures of experts are not supported")

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().float().reshape(-1, tensor.shape[-1])

    return [
        FunctionLayer(name, layers[name], rows(x), rows(factor), rows(gradient))
        for (name, (x, factor, _)), gradient in zip(seen.items(), found, strict=True)
    ]


@torch.no_grad()
def reset_learned_part(module: nn.Module) -> None:
    """Set the functions of a KAN layer to their start: an edge's base branch, a group's initial function.

    The start of an edge without a base branch is a random draw, which no longer exists: it becomes zero.
    """
    kind = KIND[type(module).__name__]
    if kind == "edge":
        module.spline.weight.zero_()
    elif kind == "group":
        start = module.basis.initial_coefficients(module.initial)
        module.coefficients.copy_(start.expand(module.groups, -1))


def without_learned_part(model: nn.Module) -> nn.Module | None:
    """A copy of `model` whose KAN layers have their start's functions; None where there is no KAN layer."""
    twin = copy.deepcopy(model)
    layers = kan_layers(twin)
    for module in layers.values():
        reset_learned_part(module)
    return twin if layers else None


def with_random_weights(model: Any, seed: int) -> nn.Module:
    """A model of the same configuration as it is before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = type(model)(copy.deepcopy(model.config))
    return twin.to(next(model.parameters()).device).float().eval()


@contextmanager
def replaced(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, `module(x)` is function(x), and a gated `module(x, u)` is function(x) * u.

    The module itself does not run, which is most of the time of a model whose functions are replaced.
    """

    def forward(x: Tensor, u: Tensor | None = None) -> Tensor:
        y = function(x).to(x.dtype)
        return y if u is None else y * u

    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
