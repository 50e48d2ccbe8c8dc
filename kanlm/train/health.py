"""What can go wrong in KAN layers, measured on one batch.

Shapes: N rows, I inputs or channels, K basis functions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kanlm.initial import kan_coefficient_names
from kanlm.kernels import functions_called
from kanlm.model.ffn import FeedForward
from kanlm.model.kan import KANLinear, LearnedFunction

ACTIVE = 1e-6
"""A basis function is dead on a batch where its absolute value never reaches this."""


def health_metrics(accelerator: Accelerator, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What the log says of a training batch: `kan_health`, and the largest of each kind as `kan_...`.

    Nothing for a model without KAN layers, and for sharded parameters, which cannot be measured.
    """
    plain = accelerator.unwrap_model(model)
    if isinstance(model, FSDPModule) or not kan_coefficient_names(plain):
        return {}
    batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
    with accelerator.autocast():
        health = kan_health(plain, batch | {"use_cache": False})
    worst: dict[str, float] = {}
    for layer in health.values():
        for kind, value in layer.items():
            worst[f"kan_{kind}"] = max(worst.get(f"kan_{kind}", value), value)
    return worst | {"kan_health": health}


def kan_health(model: nn.Module, batch) -> dict[str, dict[str, float]]:
    """Measurements of every KAN layer and feed-forward block of `model` on `batch`, by module name.

    batch: keyword arguments (a dict) or the input of `model`. The gradients are those of the output's
    `loss`, or of the mean square of the output (or its `logits`) where there is none; `.grad` of the
    parameters is left alone.

    Of `KANLinear` and `LearnedFunction`:

    - `outside_grid`, share of the inputs outside the grid;
    - `dead_functions`, share of the basis functions (of each input or group) that no input reached;
    - `zero_gradients`, share of the trainable elements whose gradient is exactly zero or absent;
    - `output_rms`, root mean square of the output;
    - `nonfinite`, number of outputs, parameters and gradients that are not finite.

    Of feed-forward blocks: `output_rms`, and `scale_to_mlp`, the same over that of a new GELU MLP of equally
    many parameters.
    """
    inputs, outputs = {}, {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (KANLinear, LearnedFunction, FeedForward))
    }

    def record(name):
        def hook(module, args, output):
            inputs[name], outputs[name] = args[0].detach(), output.detach()

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in layers.items()]
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with torch.enable_grad(), functions_called(model):
            result = model(**batch) if isinstance(batch, dict) else model(batch)
            loss = getattr(result, "loss", None)
            if loss is None:
                loss = getattr(result, "logits", result).float().square().mean()
            found = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    gradients = dict(zip(trainable, found, strict=True))

    health = {}
    with torch.no_grad():
        for name, module in layers.items():
            if name not in outputs:  # a block that this batch does not reach
                continue
            root_mean_square = float(outputs[name].float().square().mean().sqrt())
            health[name] = {"output_rms": root_mean_square}
            if isinstance(module, FeedForward):
                health[name]["scale_to_mlp"] = root_mean_square / module.gelu_scale()
            else:
                x = inputs[name].reshape(-1, inputs[name].shape[-1])
                own = [key for key in trainable if key.startswith(f"{name}." if name else "")]
                own_parameters = [trainable[key] for key in own]
                health[name] |= _layer_health(module, x, own_parameters, [gradients[key] for key in own])
                health[name]["nonfinite"] += float((~outputs[name].isfinite()).sum())
    return health


def _layer_health(
    layer: KANLinear | LearnedFunction,
    x: Tensor,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
) -> dict[str, float]:
    """x [N, I]; the gradients of the parameters, None where there is none."""
    grid = layer.basis.grid_points().to(x.device)
    outside = (x < grid[0]) | (x > grid[-1])
    elements = sum(parameter.numel() for parameter in parameters)
    zeros = broken = 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        zeros += parameter.numel() if gradient is None else int((gradient == 0).sum())
        broken += int((~parameter.isfinite()).sum())
        broken += 0 if gradient is None else int((~gradient.isfinite()).sum())
    return {
        "outside_grid": float(outside.float().mean()),
        "dead_functions": _dead_share(layer, x),
        "zero_gradients": zeros / max(elements, 1),
        "nonfinite": float(broken),
    }


def _dead_share(layer: KANLinear | LearnedFunction, x: Tensor) -> float:
    """Share of the functions, of each input or group of channels, that x [N, I] never reaches."""
    if isinstance(layer, LearnedFunction) and layer.is_rational:
        return 0.0
    basis = layer.basis
    reached = torch.zeros(basis.num_functions, x.shape[-1], device=x.device)
    for rows in x.split(1024):
        reached = torch.maximum(reached, basis.values(rows).abs().amax(0).float())  # [K, I]
    if isinstance(layer, LearnedFunction):
        reached = reached.unflatten(-1, (layer.groups, -1)).amax(-1)  # [K, groups]
    return float((reached < ACTIVE).float().mean())
