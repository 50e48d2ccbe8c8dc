"""How the cost of one training step of a layer grows: KAN and MLP against width, tokens, grid and depth.

    python scripts/bench_growth.py [--out docs/benchmarks/DATE-growth.json] [--plot docs/growth.png]
    [--seconds 120]

Each point is the median over rounds of forward + backward of a stack of layers, KAN (cubic B-splines) and
GELU MLP with equally many parameters. The fitted exponent is the slope of log(seconds) against log(value)
by least squares.
"""

from __future__ import annotations

import argparse
import math
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from kanlm import kernels
from kanlm.bench.layer import TwoLayerMLP
from kanlm.bench.measure import Arm, rounds
from kanlm.model.kan import KANLinear
from kanlm.runs import provenance, write_json

CENTRE = {"width": 192, "tokens": 1024, "grid": 8, "depth": 1}
SWEEPS = {
    "width": (64, 128, 256, 512),
    "tokens": (256, 512, 1024, 2048, 4096),
    "grid": (4, 8, 16, 32),
    "depth": (1, 2, 4, 8),
}


def stack(kind: str, width: int, grid: int, depth: int) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        parameters = width * width * (grid + 4)
        return nn.Sequential(*(TwoLayerMLP(width, width, parameters) for _ in range(depth)))
    layers = nn.Sequential(*(KANLinear(width, width, grid_size=grid) for _ in range(depth)))
    kernels.select(layers, "auto" if kind == "kan" else "reference")
    return layers


def point(kind: str, width: int, tokens: int, grid: int, depth: int) -> Arm:
    layers = stack(kind, width, grid, depth)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def step() -> None:
        layers.zero_grad(set_to_none=True)
        layers(x).sum().backward()

    return Arm(kind, step, tokens, sum(p.numel() for p in layers.parameters()))


def exponent(values: tuple[int, ...], seconds: list[float]) -> float:
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def plot(curves: dict, path: str, label: str = "forward + backward, ms") -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), sharey=True)
    for axis, (name, curve) in zip(axes, curves.items(), strict=True):
        for kind, line in curve["seconds"].items():
            legend = f"{kind}: {name}^{curve['exponents'][kind]:.2f}"
            axis.loglog(curve["values"], [1e3 * s for s in line], marker="o", label=legend)
        axis.set_xlabel(name)
        axis.set_xticks(curve["values"], labels=[str(v) for v in curve["values"]])
        axis.minorticks_off()
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-growth.json")
    parser.add_argument("--plot", default="docs/growth.png")
    parser.add_argument("--seconds", type=float, default=100.0)
    arguments = parser.parse_args()
    share = arguments.seconds / sum(map(len, SWEEPS.values()))
    curves = {}
    for name, values in SWEEPS.items():
        seconds: dict[str, list[float]] = {"kan": [], "kan reference": [], "mlp": []}
        for value in values:
            arms = [point(kind, **(CENTRE | {name: value})) for kind in seconds]
            for kind, taken in rounds(arms, share, least=3, most=30).items():
                seconds[kind].append(sorted(taken)[len(taken) // 2])
        exponents = {kind: exponent(values, line) for kind, line in seconds.items()}
        curves[name] = {"values": values, "seconds": seconds, "exponents": exponents}
        print(f"{name:7}", ", ".join(f"{kind} {power:.2f}" for kind, power in exponents.items()), flush=True)
    write_json(Path(arguments.out), {"centre": CENTRE, "curves": curves, **provenance()})
    plot(curves, arguments.plot)
    print(f"written to {arguments.out} and {arguments.plot}")


if __name__ == "__main__":
    main()
