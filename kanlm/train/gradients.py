"""Gradients between the backward pass and the optimiser: exchanged once a step, summed, measured, clipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def no_sync(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Gradients stay local to the process: for every micro-batch of a step but the last."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)  # accelerate does not know of the sharding done here on a CPU
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def global_sum(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all processes, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """L2 norm of all gradients, over all shards; 0-dim, on the device."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(model: nn.Module, norm: float, max_norm: float) -> None:
    """Scale all gradients so that their norm, which is `norm`, is at most `max_norm`; 0 = no clipping.

    torch's own clipping multiplies every gradient in every step, by 1 where nothing is to do.
    """
    if max_norm > 0 and norm > max_norm:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, max_norm / norm)
