"""Whole training steps with torch's Muon and with the one that batches matrices of one shape, in turns.

python scripts/bench_muon.py [--out docs/benchmarks/DATE-muon.json] [--rounds 12]
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanlm import kernels
from kanlm.model import KanLMConfig, KanLMForCausalLM
from kanlm.runs import write_json
from kanlm.train.muon import BatchedMuon

SIZES: dict[str, dict[str, Any]] = {
    "0.3m": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 360},
    "1m": {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 512},
}
ARMS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "kan_act": {"kan_num_groups": 8, "kan_grid_size": 16, "kan_grid_min": -4.0, "kan_grid_max": 4.0},
}
WARM_UP = 2


def step_seconds(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step with each optimiser; 8 x 128 tokens a step."""
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    matrices = [p for p in blocks if min(p.shape) > 32]  # without the functions' coefficients
    found = {id(p) for p in matrices}
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in found], lr=1e-4)
    muons = {
        "torch": torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw"),
        "batched": BatchedMuon(matrices, lr=1e-4, adjust_lr_fn="match_rms_adamw"),
    }
    ids = torch.randint(0, 1024, (8, 128))
    seconds: dict[str, list[float]] = {name: [] for name in muons}
    for turn in range(rounds + WARM_UP):
        for name in list(muons)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muons[name].step()
            rest.step()
            model.zero_grad()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=f"docs/benchmarks/{datetime.now(UTC):%Y-%m-%d}-muon.json")
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for size, sizes in SIZES.items():
        for arm, own in ARMS.items():
            torch.manual_seed(0)
            fields = {"vocab_size": 1024, "max_position_embeddings": 256, "hidden_norm": True, **sizes, **own}
            model = KanLMForCausalLM(KanLMConfig(ffn_type=arm, **fields))
            kernels.select(model)
            seconds = step_seconds(model, arguments.rounds)
            ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
            rows[f"{size} {arm}"] = {"times_tokens_per_second": ratio, "step_seconds": seconds}
            print(f"{size} {arm}: {ratio:.2f} times the tokens/s", flush=True)
    conditions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(Path(arguments.out), {**conditions, "rows": rows})
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
