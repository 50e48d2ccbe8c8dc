"""A model ready to train, put together in one place for training, speed measurements and benchmarks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanlm import kernels
from kanlm.config import TrainConfig, UserError, one_line
from kanlm.initial import decoder_layers, kan_coefficient_names, model_class
from kanlm.train.optimizer import optimizers

MakeOptimizers = Callable[[Any], list[torch.optim.Optimizer]]
Placement = Callable[[Any, MakeOptimizers], tuple[nn.Module, list[Any]]]
"""Where a model goes, and how: it returns the model and the optimisers to use from then on."""


@dataclass(frozen=True)
class Trainable:
    """A model with its optimisers, as they were placed."""

    model: nn.Module
    optimizers: list[Any]
    kernels: dict[str, str]
    """Implementation of each KAN operation, by module name."""


def build(
    architecture: Any,
    settings: TrainConfig,
    device: torch.device,
    *,
    seed: int = 0,
    init_from: str | None = None,
    placement: Placement | None = None,
) -> Trainable:
    """The model of `architecture` in training mode, with checkpointing, compilation, kernels and optimisers.

    `architecture`: a KanLMConfig, or the config of a converted family. `init_from`: a folder whose weights it
    begins with. Without a `placement` (accelerate's DDP or FSDP2) the model simply goes to `device`.
    """
    torch.manual_seed(seed)
    model = initial_model(init_from, architecture) if init_from else model_class(architecture)(architecture)
    if settings.trainable == "functions":
        freeze_all_but_functions(model)
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():  # the new name came after the oldest transformers that is supported
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        # Layer by layer: all layers of one shape share a compiled graph, and FSDP2 shards at the same places.
        for layer in decoder_layers(model):
            layer.compile()
        # A process keeps 8 compiled forms of a layer and runs others eagerly: one more for each model's own.
        torch._dynamo.config.recompile_limit += 1
    # Optimisers come after the move: FSDP2 replaces the parameters by shards.
    place = placement or partial(plain_placement, device)
    placed, made = place(model, partial(optimizers, config=settings, device=device))
    # Kernels come last: which of them can run depends on the device that the parameters lie on.
    chosen = kernels.select(model, settings.kernels, compiled=settings.compile)
    placed.train()
    return Trainable(placed, made, chosen)


def initial_model(folder: str | Path, architecture: Any) -> Any:
    """The fp32 model of `architecture` with the weights in `folder`.

    Raises:
        UserError: weights of another model.
    """
    try:
        kind = model_class(architecture)
        return kind.from_pretrained(str(folder), config=architecture, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"init_from: {one_line(error)}") from None


def freeze_all_but_functions(model: nn.Module) -> None:
    """Let only the coefficients of learned functions train.

    Raises:
        UserError: there are none.
    """
    functions = kan_coefficient_names(model)
    if not functions:
        raise UserError("train.trainable: 'functions', and this model has no learned function; write 'all'")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in functions)


def plain_placement(
    device: torch.device, model: nn.Module, make_optimizers: MakeOptimizers
) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """All on one device, without accelerate."""
    nn.Module.to(model, device)
    return model, make_optimizers(model)
