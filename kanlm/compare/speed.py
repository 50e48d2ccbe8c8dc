"""Training-step times, measured in turns in one process, so that a busy machine slows all arms alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kanlm.compare.plan import Study
from kanlm.compare.schema import MATCHINGS, PlannedArm
from kanlm.config import RunConfig
from kanlm.model import KanLMConfig
from kanlm.runs import read_json, write_json
from kanlm.timing import take_turns
from kanlm.train.build import build
from kanlm.train.parallel import mixed_precision
from kanlm.train.step import clip_gradients, gradient_norm

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ensure_speed(study: Study) -> dict[str, Any] | None:
    """speed.json, which is measured again where arms, widths or rounds changed; None without rounds."""
    settings, path = study.config.speed, study.directory.speed
    if not settings.rounds:
        return None
    arms = [arm for arm in study.arms if MATCHINGS[arm.matching].budget == "tokens"]
    wanted = sorted((arm.matching, arm.size, arm.arm, arm.intermediate_size) for arm in arms)
    if path.is_file():
        stored = read_json(path)
        keys = ("matching", "size", "arm", "intermediate_size")
        same_arms = sorted(tuple(row[key] for key in keys) for row in stored["arms"]) == wanted
        if same_arms and stored["rounds"] == settings.rounds:
            return stored
    print(f"step times: {settings.rounds} rounds of all arms in turns", flush=True)
    speed = measured_speed(study, arms, settings.rounds, settings.warmup)
    write_json(path, speed)
    return speed


def measured_speed(study: Study, arms: Sequence[PlannedArm], rounds: int, warmup: int) -> dict[str, Any]:
    """speed.json: `rounds` training steps of every arm, one arm after the other in each round.

    A step is forward, backward, clipping and optimiser on one micro-batch of random tokens, on one device,
    with the run's precision, kernels and compilation: time depends on shapes, not on what was learned. Sizes
    are measured apart, since only arms of one size are compared.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = study.runs[arms[0].key]
    rows, dtypes = [], []
    for size in study.config.sizes:
        group = [arm for arm in arms if arm.size == size.name]
        runs = [study.runs[arm.key] for arm in group]
        if device.type == "cpu" and runs[0].train.num_threads:
            torch.set_num_threads(runs[0].train.num_threads)
        steps = [training_step(study.runs[arm.key], study.architectures[arm.key], device) for arm in group]
        dtypes += [dtype for _, dtype in steps]
        turns = take_turns([step for step, _ in steps], range(warmup + rounds).__contains__, device.type)
        seconds = [taken[warmup:] for taken in turns]
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
    return {
        "rounds": rounds,
        "arms": rows,
        "tokens_per_step": step_sequences(first) * first.data.block_size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "dtype": str(dtypes[0]).removeprefix("torch."),
        "compiled": first.train.compile,
    }


def step_sequences(run: RunConfig) -> int:
    return run.train.micro_batches(1)[0]


def training_step(
    run: RunConfig, model: KanLMConfig, device: torch.device
) -> tuple[Callable[[], None], torch.dtype]:
    """A function that does one training step of `run`'s model, and the precision of its products."""
    built = build(model, run.train, device, seed=run.seed)
    dtype = DTYPES[mixed_precision(run.train, device)]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    shape = step_sequences(run), run.data.block_size
    tokens = torch.randint(model.vocab_size, shape, device=device)  # [B, T]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = built.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        scaler.scale(loss).backward()
        for optimizer in built.optimizers:
            scaler.unscale_(optimizer)
        clip_gradients(built.model, gradient_norm(built.model).item(), run.train.max_grad_norm)
        for optimizer in built.optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()

    return step, dtype
