"""What people and programs see of a run: a progress bar or plain lines, metrics.jsonl, and the trackers."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from kanlm.config import UserError
from kanlm.runs import RunDir, RunRecord, write_json, write_text
from kanlm.train import tracking
from kanlm.train.resume import TrainerState

PEAK_TFLOPS = {  # dense bf16 tensor-core peaks of the vendors' data sheets
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "A10G": 70,
    "RTX 4090": 165,
}


class Progress:
    """Speaks for the main process; on all others every method does nothing."""

    def __init__(
        self,
        accelerator: Accelerator,
        metrics: Path,
        total_steps: int,
        first_step: int,
        goes_on: bool = False,
    ):
        self.goes_on, self.complained = goes_on, False
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.total_steps = total_steps
        self.newest: dict[str, Any] = {}
        self.bar = None
        self.file = None
        if self.main:
            keep_metrics_until(metrics, first_step)
            self.file = open(metrics, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def say(self, line: str) -> None:
        if self.main:
            if self.bar is not None:
                self.bar.write(line)
            else:
                print(line, flush=True)

    def step_done(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, the same to the tracker, and a readable form of it."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            self.not_written(self.file.name, error)
        self.track(values)
        self.newest |= values
        if self.bar is not None:
            self.bar.set_postfix_str(self._short(self.newest))
        else:
            print(f"step {values['step']}/{self.total_steps}  {self._short(self.newest)}", flush=True)

    def track(self, values: dict[str, Any]) -> None:
        """The numbers among `values`, which hold the step, to the tracker alone."""
        numbers = {
            key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "step"
        }
        if failure := tracking.log(self.accelerator, numbers, values["step"]):
            self.say(failure)

    def _short(self, values: dict[str, Any]) -> str:
        parts = []
        if "loss" in values:
            parts += [f"loss {values['loss']:.4f}"]
        if "validation_bits_per_byte" in values:
            parts += [f"{values['validation_bits_per_byte']:.3f} bits/byte"]
        if values.get("tokens_per_second"):
            parts += [f"{values['tokens_per_second']:,.0f} tokens/s"]
            # Of a CPU the peak is a short measurement, which a busy machine makes a fraction of the truth.
            if self.accelerator.device.type != "cpu":
                parts += [f"{values['mfu']:.1%} of peak"]
            if self.bar is None and "seconds_left" in values:
                parts += [f"{timedelta(seconds=math.ceil(values['seconds_left']))} left"]
        return "  ".join(parts)

    def not_written(self, path: str | Path, error: OSError) -> None:
        """A full disk: UserError, or once a line where training is to go on without checkpoints."""
        line = f"{path}: cannot be written ({error.strerror}); free some space"
        if not self.goes_on:
            raise UserError(f"{line} and run again")
        if not self.complained:
            self.say(f"{line}; training goes on without it (train.on_checkpoint_error = continue)")
            self.complained = True

    def sync(self) -> None:
        """Metrics on the disk, so that a checkpoint never outlives the lines before it."""
        if self.file is not None:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                self.not_written(self.file.name, error)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.file is not None:
            with suppress(OSError):  # a line that log() could not write, and said so
                self.file.close()


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run does again, and those that are damaged."""
    if not path.exists():
        return
    kept = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last one a kill has cut off
                print(f"{path}: line {number} is damaged and left out", file=sys.stderr, flush=True)
            continue
        kept.append(line.decode())
    write_text(path, "".join(line + "\n" for line in kept))


class BusyNotice:
    """Finds out that other programs take the processor away from training on a CPU, and says it once.

    The thread that trains never waits for anything but the processor: between kernels it computes, in a
    kernel it does its share. Where its processor time falls behind the clock, something else had the core.
    """

    SECONDS, SHARE = 20.0, 0.75

    def __init__(self, accelerator: Accelerator):
        # Several processes also wait for each other, a GPU's is waited for.
        self.watching = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self.seconds = self.thread_seconds = 0.0

    def step_done(self, seconds: float, thread_seconds: float) -> str | None:
        """The line to say after a step that took `seconds`, of them `thread_seconds` on a processor."""
        self.seconds += seconds
        self.thread_seconds += thread_seconds
        if not self.watching or self.seconds < self.SECONDS:
            return None
        share = self.thread_seconds / self.seconds
        self.seconds = self.thread_seconds = 0.0
        if share >= self.SHARE:
            return None
        self.watching = False
        return (
            f"this machine is busy: training had the processor for {share:.0%} of the last "
            f"{self.SECONDS:.0f} seconds; end other programs, or leave them a core with "
            f"train.num_threads (now {torch.get_num_threads()})"
        )


def peak_flops_per_second(device: torch.device, low_precision: bool) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the number comes from.

    The data sheet's bf16 value for a known GPU in mixed precision, otherwise the fastest of a few matrix
    products.
    """
    if device.type == "cuda" and low_precision:
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops * 1e12, f"data sheet, {known} bf16"
    size = 4096 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if low_precision and device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay untouched
    a = torch.rand(size, size, generator=generator).to(device, dtype)
    best = math.inf
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, f"measured, {size} x {size} {str(dtype).removeprefix('torch.')} matrix product"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a GPU, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class RecordKeeper:
    """Keeps run.json in step with the trainer state; only the main process writes."""

    def __init__(self, run: RunDir, record: RunRecord, accelerator: Accelerator, progress: Progress):
        self.progress = progress
        self.run, self.record, self.main = run, record, accelerator.is_main_process
        self.device = accelerator.device
        self.written = -math.inf

    def __call__(self, state: TrainerState, at_most_every_seconds: float = 0.0) -> None:
        record = self.record
        if time.monotonic() - self.written < at_most_every_seconds:
            return
        self.written = time.monotonic()
        record.step, record.tokens, record.seconds = state.step, state.tokens, state.seconds
        record.skipped_steps = state.skipped_steps
        if state.step:
            record.tokens_per_second = state.tokens / state.seconds
        record.peak_memory_bytes = peak_memory_bytes(self.device)
        if self.main:
            try:
                write_json(self.run.record, record)
            except OSError as error:
                self.progress.not_written(self.run.record, error)
