"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from kanlm.config import TrainConfig


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of `step` (0-based, below `total_steps`) over the peak, in (0, 1].

    Linear warm-up over ceil(warmup_fraction * total_steps) steps, then
    cosine: half a period down to `min_lr_ratio` (Loshchilov & Hutter 2017, eq. 5,
    https://arxiv.org/abs/1608.03983);
    linear: a line down to it;
    wsd: constant, then a line down to it over the last decay_fraction * total_steps steps
    (Hägele et al. 2024, https://arxiv.org/abs/2405.18392).
    The last step runs at exactly `min_lr_ratio`.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step: {step} lies outside [0, {total_steps})")
    warmup = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    decay = total_steps - warmup
    if config.schedule == "wsd":
        decay = min(decay, max(1, round(config.decay_fraction * total_steps)))
    progress = max(0.0, 1 - (total_steps - 1 - step) / decay)  # 0 at the peak, 1 at the last step
    if config.schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape
