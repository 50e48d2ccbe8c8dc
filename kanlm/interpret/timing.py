"""Step times of models beside each other, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def step_seconds(models: Sequence[Any], input_ids: Tensor, rounds: int = 5) -> list[float]:
    """Seconds of a forward and backward pass over tokens [B, T]: the fastest of `rounds`, taken in turns."""
    best = [float("inf")] * len(models)
    for number in range(rounds + 1):
        for place, model in enumerate(models):
            began = time.perf_counter()
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)
            if number:  # the first warms up
                best[place] = min(best[place], time.perf_counter() - began)
    return best
