"""Whole training steps of every arm with torch's Muon and with the batched one, in turns.

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
from kanlm.bench.train import ARMS, architecture
from kanlm.model import KanLMForCausalLM
from kanlm.runs import provenance, write_json
from kanlm.train.muon import BatchedMuon
from kanlm.train.optimizer import parameter_groups

WARM_UP = 2


def step_seconds(model: KanLMForCausalLM, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step with each optimiser; 8 x 128 tokens a step."""
    matrices = [parameter for _, parameter in parameter_groups(model)["matrices"]]
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
    for size in ("0.3m", "1m"):
        for arm in ARMS:
            torch.manual_seed(0)
            model = KanLMForCausalLM(architecture(arm, size))
            kernels.select(model)
            seconds = step_seconds(model, arguments.rounds)
            ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
            rows[f"{size} {arm}"] = {"times_tokens_per_second": ratio, "step_seconds": seconds}
            print(f"{size} {arm}: {ratio:.2f} times the tokens/s", flush=True)
    conditions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(Path(arguments.out), {**conditions, **provenance(), "rows": rows})
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
