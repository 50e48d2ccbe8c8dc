"""The reference in chunks of rows, computed again in backward: little memory, on any device, for any basis.

A KAN layer's basis values are K times as large as its input. Here they are alive for one chunk of rows at a
time, and of each chunk only the input is kept for backward. It calls the reference, so it serves whatever the
latter does: adapters and quantised weights in place of the layer's children, autocast, second derivatives.

Shapes: N rows (all leading dimensions together), I inputs, C channels, K basis functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kanlm.model.kan import KANLinear, LearnedFunction

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Size of the basis values [n, K, I] alive at once: on a CPU they fit a cache, on a GPU they keep it busy."""


def chunk_rows(layer: KANLinear | LearnedFunction, x: Tensor) -> int:
    """Rows of x [N, I] in a chunk."""
    budget = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"])
    return max(128, budget // (4 * layer.num_functions * x.shape[-1]))


def edge(layer: KANLinear, x: Tensor) -> Tensor:
    """KANLinear: x [..., I] to [..., O]."""
    rows = x.reshape(-1, x.shape[-1])
    y = [_again(layer, chunk) for chunk in rows.split(chunk_rows(layer, rows))]
    return torch.cat(y).view(*x.shape[:-1], layer.out_features)


def learned(layer: LearnedFunction, a: Tensor, u: Tensor | None) -> Tensor:
    """LearnedFunction: phi(a) * u, or phi(a) where u is None; [..., C]."""
    rows = a.reshape(-1, a.shape[-1])
    size = chunk_rows(layer, rows)
    chunks = rows.split(size)
    gates = [None] * len(chunks) if u is None else u.reshape(rows.shape).split(size)
    return torch.cat([_again(layer, *chunk) for chunk in zip(chunks, gates, strict=True)]).view(a.shape)


def _again(layer: KANLinear | LearnedFunction, *inputs: Tensor | None) -> Tensor:
    reference: Callable[..., Tensor] = layer.reference
    if not torch.is_grad_enabled():
        return reference(*inputs)
    return checkpoint(reference, *inputs, use_reentrant=False)
