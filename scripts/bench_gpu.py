"""Every GPU check in one go: kernel tests, kernel timings, whole training steps. Can be cut off at any
moment.

    python scripts/bench_gpu.py [--out docs/benchmarks/DATE-gpu.json] [--seconds 600]

Results are written after each part, so what was measured before an interruption is kept. Parts, in order:
the tests of the Triton kernels; full-edge forward and backward as a fraction of the matrix product of equal
FLOPs, in bf16, over tile sizes; phi(a) * u against SiLU(a) * u; training steps of 100M-parameter arms,
eager and compiled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F

from kanlm import kernels
from kanlm.bench import train
from kanlm.bench.measure import Arm, rounds
from kanlm.config import UserError
from kanlm.model.kan import KANLinear, LearnedFunction
from kanlm.runs import provenance, write_json

TILES = ((128, 32, 128), (128, 64, 128), (64, 32, 128), (128, 32, 256), (64, 64, 64))
"""Rows, inputs and outputs of a tile."""


def median_seconds(step, budget: float = 3.0) -> float:
    taken = rounds([Arm("x", step, 1, 0)], budget, "cuda", least=10, most=200)["x"]
    return sorted(taken)[len(taken) // 2]


def kernel_tests() -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_triton.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    return {"passed": result.returncode == 0, "tail": result.stdout[-2000:]}


def full_edge(tiles: tuple[int, int, int], width: int = 1024, tokens: int = 16384, grid: int = 8) -> dict:
    from kanlm.kernels import triton_ops

    rows, inputs, outputs = tiles
    meta = {"BN": rows, "BI": inputs, "BO": outputs, "num_warps": 8, "num_stages": 3}
    chosen, triton_ops._tiles = triton_ops._tiles, lambda: meta
    try:
        layer = KANLinear(width, width, grid_size=grid, base=None).to("cuda", torch.bfloat16)
        kernels.select(layer, "triton")
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dense = torch.randn(tokens, width * (grid + 3), device="cuda", dtype=torch.bfloat16)
        grad = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
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
    a, u, grad = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    a.requires_grad_(), u.requires_grad_()
    function = LearnedFunction(width, 8).to("cuda")
    kernels.select(function, "triton")
    silu = torch.compile(lambda a, u: F.silu(a) * u)
    seconds = {}
    for name, op in (("learned", function.gated), ("compiled silu", silu)):
        seconds[name] = median_seconds(lambda op=op: op(a, u).backward(grad))
    return seconds


def training(names: tuple[str, ...], compiled: bool) -> list[dict]:
    return train.run(
        "100m", names, device="cuda", compiled=compiled, seconds=60, memory=True,
        out=f"docs/benchmarks/gpu-train-{'compiled' if compiled else 'eager'}.json",
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-gpu.json")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further part after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    names = ("swiglu", "kan_glu", "kan_glu_linear", "gelu", "kan_mixed")
    parts = {
        "tests": kernel_tests,
        **{f"full_edge {tiles}": (lambda tiles=tiles: full_edge(tiles)) for tiles in TILES},
        "gate": gate,
        "training eager": lambda: training(names, compiled=False),
        "training compiled": lambda: training(names, compiled=True),
    }
    start, results = time.monotonic(), {}
    for name, part in parts.items():
        if time.monotonic() - start > arguments.seconds:
            print(f"out of time before {name}")
            break
        try:
            results[name] = part()
        except (RuntimeError, UserError) as error:  # a tile that does not fit must not cost the other parts
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(name, results[name], flush=True)
        write_json(Path(arguments.out), {"parts": results, **provenance()})
    return 0 if results.get("tests", {}).get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
