"""Every GPU check in one go: kernel tests, kernel timings, whole training steps. Can be cut off at any
moment.

    python scripts/bench_gpu.py [--out docs/benchmarks/DATE-gpu.json] [--seconds 600]
    TRITON_INTERPRET=1 python scripts/bench_gpu.py --dry-run --out /tmp/gpu.json   # without a GPU

Results are written after each part, so what was measured before an interruption is kept. Parts, in order:
the tests of the Triton kernels; training steps of 100M-parameter arms, each beside its MLP, eager and then
compiled, the arms of the study and one of each kind first; full-edge forward and backward as a fraction of
the matrix product of equal FLOPs, in bf16, over tile sizes; phi(a) * u against SiLU(a) * u; the other arms.
The default time is meant for what comes first; 1,500 seconds should leave nothing out (no GPU was at hand to
time it). A dry run goes through the same parts with tiny sizes on the CPU, in Triton's interpreter; its
timings mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F

from kanlm import kernels
from kanlm.bench import train
from kanlm.bench.measure import Arm, rounds
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.runs import provenance, write_json

DRY = "--dry-run" in sys.argv
DEVICE, HALF = ("cpu", torch.float32) if DRY else ("cuda", torch.bfloat16)
TESTS_SECONDS = 240
"""The tests of the kernels stop then, so that the timings get their turn."""
FIRST = ("kan_act_norm", "kan_glu", "kan_product_norm", "kan_mixed")
"""The arms that are timed before all others, and compiled, too."""
TRAINING_SECONDS = 20.0
"""For an arm and its MLP."""
TILES = ((128, 32, 128), (128, 64, 128), (64, 32, 128), (128, 32, 256), (64, 64, 64))
"""Rows, inputs and outputs of a tile."""


def median_seconds(step, budget: float = 3.0) -> float:
    seconds, least = (0.0, 1) if DRY else (budget, 10)
    taken = rounds([Arm("x", step, 1, 0)], seconds, DEVICE, least=least, most=200)["x"]
    return sorted(taken)[len(taken) // 2]


def kernel_tests() -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_triton.py"]
    if DRY:
        command += ["-k", "two_runs"]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=TESTS_SECONDS)
    return {"passed": result.returncode == 0, "tail": result.stdout[-2000:]}


def full_edge(tiles: tuple[int, int, int], width: int = 1024, tokens: int = 16384, grid: int = 8) -> dict:
    from kanlm.kernels import triton_ops

    if DRY:
        tiles, width, tokens = (16, 16, 16), 16, 32
    rows, inputs, outputs = tiles
    meta = {"BN": rows, "BI": inputs, "BO": outputs, "num_warps": 8, "num_stages": 3}
    chosen, triton_ops._tiles = triton_ops._tiles, lambda: meta
    try:
        layer = KANLinear(width, width, grid_size=grid, base=None).to(DEVICE, HALF)
        kernels.select(layer, "triton")
        x = torch.randn(tokens, width, device=DEVICE, dtype=HALF, requires_grad=True)
        dense = torch.randn(tokens, width * (grid + 3), device=DEVICE, dtype=HALF)
        grad = torch.randn(tokens, width, device=DEVICE, dtype=HALF)
        weight = layer.spline.weight

        def both() -> None:
            x.grad = None
            layer.zero_grad(set_to_none=True)
            layer(x).backward(grad)

        with torch.no_grad():
            forward = median_seconds(lambda: layer(x))
            product = median_seconds(lambda: F.linear(dense, weight))
            back = median_seconds(lambda: (grad @ weight, grad.t() @ dense))
        total = median_seconds(both)
    finally:
        triton_ops._tiles = chosen
    return {
        "tiles": tiles,
        "forward_seconds": forward,
        "backward_seconds": total - forward,
        "forward_fraction_of_product": product / forward,
        "backward_fraction_of_products": back / (total - forward),
    }


def gate(width: int = 2048, tokens: int = 65536) -> dict:
    if DRY:
        width, tokens = 32, 64
    a, u, grad = (torch.randn(tokens, width, device=DEVICE, dtype=HALF) for _ in range(3))
    a.requires_grad_(), u.requires_grad_()
    cubic, linear, rational = (
        LearnedFunction(width, 8, basis).to(DEVICE) for basis in ("bspline", "linear", "rational")
    )
    for function in (cubic, linear, rational):
        kernels.select(function, "triton")
    seconds = {}
    ops = {"cubic": cubic, "linear": linear, "rational": rational, "compiled silu": compiled_silu()}
    for name, op in ops.items():
        seconds[name] = median_seconds(lambda op=op: op(a, u).backward(grad))
    return seconds


def compiled_silu():
    def silu(a, u):
        return F.silu(a) * u

    return silu if DRY else torch.compile(silu)


def training(name: str, compiled: bool = False) -> list[dict]:
    """Steps of the arm and of its MLP; compiled, of both so, too."""
    if DRY:
        train.SIZES["dry"] = (128, 344, 1, 2, 1, 8)
    with TemporaryDirectory() as folder:
        return train.run(
            "dry" if DRY else "100m", (train.ARMS[name][0], name), "triton", DEVICE,
            compiled=compiled and not DRY, seconds=0.0 if DRY else TRAINING_SECONDS, memory=not DRY,
            out=f"{folder}/train.json",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-gpu.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further part after this time")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; needs no GPU")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    if DRY and os.environ.get("TRITON_INTERPRET") != "1":
        print("bench_gpu: --dry-run needs TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    if not DRY and not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    arms = [name for name, (baseline, *_) in train.ARMS.items() if name not in (*FIRST, baseline)]
    # A part for each arm and each tile: what is measured is kept at once.
    parts: dict[str, Callable[[], Any]] = {"tests": kernel_tests}
    parts |= {f"training {name}": partial(training, name) for name in FIRST}
    parts |= {f"compiled {name}": partial(training, name, True) for name in (FIRST[:1] if DRY else FIRST)}
    parts |= {f"full_edge {tiles}": partial(full_edge, tiles) for tiles in (TILES[:1] if DRY else TILES)}
    parts["gate"] = gate
    parts |= {f"training {name}": partial(training, name) for name in (arms[:1] if DRY else arms)}
    start = time.monotonic()
    results: dict[str, Any] = {}
    left = list(parts)

    def write() -> None:
        write_json(out, {"parts": results, "left_out": left, "dry_run": DRY, **provenance()})

    write()
    for name, part in parts.items():
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time before {', '.join(left)}")
            break
        left.remove(name)
        try:
            results[name] = part()
        except Exception as error:  # a tile that does not fit (TritonError) must not cost the other parts
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(name, results[name], flush=True)
        write()
    failed = [name for name, result in results.items() if isinstance(result, dict) and "error" in result]
    return 0 if results.get("tests", {}).get("passed") and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
