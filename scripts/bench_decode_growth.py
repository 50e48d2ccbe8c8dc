"""How the time of one decoded token grows: native and eager against context length, layers and width.

    python scripts/bench_decode_growth.py [--out docs/benchmarks/DATE-decode-growth.json]
    [--plot docs/decode-growth.png] [--seconds 90]

Each point is the median over rounds of one token, SwiGLU and kan_glu by the native decoder and SwiGLU by the
model's own forward pass. The fitted exponent is the slope of log(seconds) against log(value).
"""

from __future__ import annotations

import argparse
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch
from bench_growth import exponent, plot

from kanlm import kernels
from kanlm.bench.decode import eager_path, native_path
from kanlm.bench.measure import Arm, rounds
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.runs import provenance, write_json

CENTRE = {"context": 64, "layers": 4, "width": 192}
SWEEPS = {"context": (64, 256, 1024), "layers": (1, 2, 4, 8), "width": (64, 128, 256, 512)}
LINES = {"swiglu": ("swiglu", native_path), "kan_glu": ("kan_glu", native_path)}
LINES |= {"swiglu eager": ("swiglu", eager_path)}


def point(line: str, context: int, layers: int, width: int) -> Arm:
    """One token after `context` others."""
    ffn_type, open_path = LINES[line]
    torch.manual_seed(0)
    config = KanLMConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=context + 1,
        ffn_type=ffn_type,
    )
    model = KanLMForCausalLM(config).eval()
    kernels.select(model)
    way = open_path(model)
    way.start(torch.randint(0, 1024, (context,), generator=torch.Generator().manual_seed(1)))

    def step() -> None:
        way.step(1)
        way.rewind()

    return Arm(line, step, 1, sum(p.numel() for p in model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-decode-growth.json")
    parser.add_argument("--plot", default="docs/decode-growth.png")
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parser.parse_args()
    share = arguments.seconds / sum(map(len, SWEEPS.values()))
    curves = {}
    for name, values in SWEEPS.items():
        seconds: dict[str, list[float]] = {line: [] for line in LINES}
        for value in values:
            arms = [point(line, **(CENTRE | {name: value})) for line in LINES]
            for line, taken in rounds(arms, share, least=5, most=2000).items():
                seconds[line].append(statistics.median(taken))
        exponents = {line: exponent(values, taken) for line, taken in seconds.items()}
        curves[name] = {"values": values, "seconds": seconds, "exponents": exponents}
        print(f"{name:8}", ", ".join(f"{line} {power:.2f}" for line, power in exponents.items()), flush=True)
    write_json(Path(arguments.out), {"centre": CENTRE, "curves": curves, **provenance()})
    plot(curves, arguments.plot, "one token, ms")
    print(f"written to {arguments.out} and {arguments.plot}")


if __name__ == "__main__":
    main()
