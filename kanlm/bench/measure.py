"""What the benchmarks share: arms, rounds, parity, peak memory, the machine's floor, table and record."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanlm import kernels
from kanlm.config import UserError
from kanlm.runs import provenance, write_json
from kanlm.timing import seconds_of, take_turns

PARITY = {torch.float32: 2e-4, torch.bfloat16: 5e-2}
"""Largest error of outputs and gradients, relative to their largest value, against the fp64 reference."""


@dataclass
class Arm:
    """One contender: `step` does the measured work on `tokens` tokens."""

    name: str
    step: Callable[[], Any]
    tokens: int
    parameters: int
    flops: float = 0.0
    """Of one step as dense matrix products: what an MLP with these parameters does."""
    least_bytes: float = 0.0
    """Memory traffic of one step that no implementation avoids."""
    baseline: str | None = None
    """Name of the arm whose speed is 1."""
    kernels: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of a part of the steps, by name; `step` adds one a call."""


@dataclass
class Floor:
    """What this machine does at best, measured."""

    matmul_flops: float
    """FLOPs per second of a large matrix product."""
    copy_bytes: float
    """Bytes per second, read and written, of a large copy."""

    def seconds(self, arm: Arm) -> float:
        """The larger of FLOPs / rate and bytes / bandwidth."""
        return max(arm.flops / self.matmul_flops, arm.least_bytes / self.copy_bytes)


def machine_floor(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Floor:
    """Best of several products of 2048 x 2048 matrices (8192 on a GPU) and copies of 128 MiB (1 GiB)."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, device) for _ in range(8))
    source = torch.randn((2**28 if device == "cuda" else 2**25), device=device)
    target = torch.empty_like(source)
    copied = min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
    return Floor(2 * size**3 / product, 2 * source.numel() * source.element_size() / copied)


def rounds(
    arms: list[Arm], seconds: float, device: str = "cpu", least: int = 5, most: int = 1000
) -> dict[str, list]:
    """Seconds of each arm in each round, by name; all together takes about `seconds`."""
    for arm in arms:
        arm.step()
        arm.step()
    start = time.perf_counter()

    def go_on(done: int) -> bool:
        in_time = done == 0 or time.perf_counter() - start < seconds * done / (done + 1)
        return done < least or (done < most and in_time)

    times = take_turns([arm.step for arm in arms], go_on, device)
    return {arm.name: taken for arm, taken in zip(arms, times, strict=True)}


def parity_error(module: nn.Module, *inputs: torch.Tensor) -> float:
    """Largest relative error of output and gradients of `module` against its own fp64 reference.

    Each tensor's error is relative to its largest value. Integer inputs (token ids) have no gradient.
    """
    reference = copy.deepcopy(module).double()
    kernels.select(reference, "reference")
    outputs = []
    for layer, dtype in ((reference, torch.float64), (module, inputs[0].dtype)):
        given = [
            x.detach().clone().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs
        ]
        layer.zero_grad()
        y = layer(*given)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype))
        leaves = [x for x in given if x.requires_grad]
        outputs.append([y.detach(), *(x.grad for x in leaves), *(p.grad for p in layer.parameters())])
    module.zero_grad()
    return max(
        relative_error(got, expected)
        for expected, got in zip(*outputs, strict=True)
        if expected is not None or got is not None
    )


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error relative to the largest expected value; infinite where something is not a number."""
    error = float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, f"the kernel does not tell {key}"
    return int(found.group(1)) * 1024


def _peak_in_process(builder: Callable[..., Arm], arguments: tuple, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(
        -3, 1 << 17
    )  # M_MMAP_THRESHOLD: larger blocks go back to the system as soon as they are freed
    a = torch.randn(256, 256, requires_grad=True)
    (a @ a).sum().backward()
    gc.collect()
    libc.malloc_trim(0)
    before = _status_bytes("VmRSS")
    arm = builder(*arguments)
    arm.step()
    arm.step()
    gc.collect()
    libc.malloc_trim(0)
    resting = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    arm.step()
    return {"peak_bytes": _status_bytes("VmHWM") - before, "resting_bytes": resting - before}


def peak_memory(builder: Callable[..., Arm], *arguments: Any) -> dict[str, int] | None:
    """Memory of the third step of `builder(*arguments)`, in a process of its own: at its peak, and between
    steps.

    Both count from before the arm was built, so parameters, gradients and optimizer states are included.
    None where the kernel does not tell (anything but Linux).
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_in_process, builder, arguments, torch.get_num_threads()).result()


def cuda_peak_memory(arm: Arm) -> dict[str, int]:
    """The same of an arm on the GPU, by the allocator's own account."""
    arm.step()
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    arm.step()
    torch.cuda.synchronize()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "resting_bytes": resting}


def summary(
    arms: list[Arm], times: dict[str, list[float]], floor: Floor, memory: dict[str, Any]
) -> list[dict]:
    """One record an arm: medians, quartiles, ratios to its baseline, fraction of the floor, memory."""
    records = []
    for arm in arms:
        taken = times[arm.name]
        low, median, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
        record = {
            "arm": arm.name,
            "kernels": arm.kernels,
            "parameters": arm.parameters,
            "tokens": arm.tokens,
            "rounds": len(taken),
            "seconds": median,
            "seconds_quartiles": [low, high],
            "tokens_per_second": arm.tokens / median,
            "floor_fraction": floor.seconds(arm) / median if arm.flops or arm.least_bytes else None,
            **arm.details,
            **{name: statistics.median(part[-len(taken) :]) for name, part in arm.measured.items()},
        }
        if "optimizer_seconds" in record:
            record["optimizer_share"] = record["optimizer_seconds"] / median
        if arm.baseline in times:
            base = next(other for other in arms if other.name == arm.baseline)
            ratios = [
                (b / base.tokens) / (a / arm.tokens) for a, b in zip(taken, times[arm.baseline], strict=True)
            ]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            record |= {
                "baseline": arm.baseline,
                "speed_ratio": quartiles[1],
                "speed_ratio_quartiles": [quartiles[0], quartiles[2]],
            }
        if memory.get(arm.name):
            record |= memory[arm.name]
            other = memory.get(arm.baseline or "")
            if other:
                record["memory_ratio"] = record["peak_bytes"] / other["peak_bytes"]
        records.append(record)
    return records


def table(records: list[dict]) -> str:
    """The records as plain text, one line an arm."""
    header = [
        "arm",
        "kernels",
        "params",
        "ms",
        "quartiles",
        "tokens/s",
        "x baseline",
        "of floor",
        "peak MiB",
        "x mem",
        "optimizer",
    ]

    def cells(record: dict) -> list[str]:
        share = record.get("optimizer_share")
        low, high = record["seconds_quartiles"]
        ratio, memory = record.get("speed_ratio"), record.get("memory_ratio")
        fraction, peak = record["floor_fraction"], record.get("peak_bytes")
        return [
            record["arm"],
            record["kernels"],
            f"{record['parameters']:,}",
            f"{record['seconds'] * 1e3:.2f}",
            f"{low * 1e3:.2f}-{high * 1e3:.2f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{ratio:.3f} {record['baseline']}" if ratio else "-",
            f"{fraction:.2f}" if fraction else "-",
            f"{peak / 2**20:.0f}" if peak else "-",
            f"{memory:.2f}" if memory else "-",
            f"{share:.0%}" if share else "-",
        ]

    rows = [header, *map(cells, records)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def saved(
    name: str, settings: dict, floor: Floor, records: list[dict], skipped: dict[str, str], out: str | None
) -> Path:
    """Write the result to `out`, or to runs/benchmarks/DATE-NAME.json; the path."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    path = Path(out) if out else Path("runs/benchmarks") / f"{date}-{name}.json"
    result = {
        "benchmark": name,
        "settings": settings,
        "machine_floor": {"matmul_flops": floor.matmul_flops, "copy_bytes": floor.copy_bytes},
        "arms": records,
        "skipped": skipped,
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    json.dumps(result, allow_nan=False)
    write_json(path, result)
    return path


def require_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: 'cuda' was asked for, and torch sees no CUDA device; choose cpu")


def report(
    name: str,
    settings: dict,
    arms: list[Arm],
    memory: dict[str, Any],
    skipped: dict[str, str],
    *,
    seconds: float,
    device: str,
    dtype: torch.dtype = torch.float32,
    out: str | None = None,
    echo: Callable[[str], Any] = print,
) -> list[dict]:
    """Time `arms`, print table and skipped arms, save the JSON; the records."""
    floor = machine_floor(device, dtype)
    times = rounds(arms, seconds, device)
    records = summary(arms, times, floor, memory)
    echo(
        f"{name}: {settings}; {torch.get_num_threads()} threads; this machine's matrix product "
        f"{floor.matmul_flops / 1e9:.0f} GFLOP/s, copy {floor.copy_bytes / 1e9:.1f} GB/s"
    )
    echo(table(records))
    for arm, reason in skipped.items():
        echo(f"skipped {arm}: {reason}")
    path = saved(name, settings, floor, records, skipped, out)
    echo(f"written to {path}")
    return records
