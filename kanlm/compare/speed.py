"""Training-step times, measured in turns in one process, so that a busy machine slows all arms alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kanlm import kernels
from kanlm.compare.plan import trial_config
from kanlm.compare.schema import CompareConfig, PlannedArm, Trial
from kanlm.config import RunConfig
from kanlm.model import KanLMForCausalLM
from kanlm.sizing import architecture
from kanlm.train.optimizer import optimizers


def measured_speed(config: CompareConfig, arms: Sequence[PlannedArm], vocab_size: int) -> dict[str, Any]:
    """speed.json: `rounds` training steps of every arm, one arm after the other in each round.

    A step is forward, backward, clipping and optimiser on one micro-batch of random tokens, on one device,
    with the run's precision, kernels and compilation: time depends on shapes, not on what was learned. Order
    is reversed in every other round. Sizes are measured apart, since only arms of one size are compared.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    first = None
    for size in config.sizes:
        group = [arm for arm in arms if arm.size == size.name and arm.matching != "wallclock"]
        runs = [trial_config(config, arm, _trial(config, arm)) for arm in group]
        first = first or runs[0]
        if device.type == "cpu" and runs[0].train.num_threads:
            torch.set_num_threads(runs[0].train.num_threads)
        steps = [training_step(run, vocab_size, device) for run in runs]
        seconds: list[list[float]] = [[] for _ in steps]
        for turn in range(-config.speed.warmup, config.speed.rounds):
            order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
            for index in order:
                elapsed = steps[index]()
                if turn >= 0:
                    seconds[index].append(elapsed)
        tokens = step_sequences(runs[0]) * runs[0].data.block_size
        for arm, times in zip(group, seconds, strict=True):
            low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
            rows.append(
                {
                    "matching": arm.matching,
                    "size": arm.size,
                    "arm": arm.arm,
                    "intermediate_size": arm.intermediate_size,
                    "step_seconds": times,
                    "median_seconds": statistics.median(times),
                    "tokens_per_second": tokens / statistics.median(times),
                    "low": tokens / high,
                    "high": tokens / low,
                }
            )
    assert first is not None
    return {
        "rounds": config.speed.rounds,
        "arms": rows,
        "tokens_per_step": step_sequences(first) * first.data.block_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(autocast_dtype(first, device) or torch.float32).removeprefix("torch."),
        "compiled": first.train.compile,
    }


def _trial(config: CompareConfig, arm: PlannedArm) -> Trial:
    return Trial(
        name="speed",
        kind="sweep",
        matching=arm.matching,
        size=arm.size,
        arm=arm.arm,
        seed=0,
        learning_rate=1e-4,
        max_tokens=1,
    )


def step_sequences(run: RunConfig) -> int:
    return run.train.micro_batch_size or run.train.batch_size


def autocast_dtype(run: RunConfig, device: torch.device) -> torch.dtype | None:
    """The dtype that training autocasts to on `device`; None = fp32 throughout."""
    precision = run.train.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[precision]


def training_step(run: RunConfig, vocab_size: int, device: torch.device) -> Callable[[], float]:
    """A function that does one training step of `run`'s model and returns its seconds."""
    torch.manual_seed(run.seed)
    model = KanLMForCausalLM(architecture(run, vocab_size))
    torch.nn.Module.to(model, device).train()
    kernels.select(model, run.train.kernels)
    if run.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if run.train.compile:
        for layer in model.model.layers:
            layer.compile()
    optimisers = optimizers(model, run.train, device)
    dtype = autocast_dtype(run, device)
    tokens = torch.randint(vocab_size, (step_sequences(run), run.data.block_size), device=device)  # [B, T]

    def step() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if run.train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.max_grad_norm)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step
