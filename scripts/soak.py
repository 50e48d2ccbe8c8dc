"""A long run of the smallest model: memory, descriptors, threads and disk have to stay flat.

    python scripts/soak.py --steps 20_000 --tracker tensorboard --out soak.json

Trains in a process of its own with logs, validations, checkpoints and a tracker, looks at it from outside
after every 2% of the steps, and prints a table. Exit status 1 where something grows: from 20% of the steps to
the end more than 20 MiB of resident memory, more than 2 descriptors or threads, or checkpoints that take
more room. metrics.jsonl and the tracker's file hold a line for every logged step, so these grow; bytes a
line are told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from kanlm.runs import provenance, write_json

CONFIG = """
name = "soak"
output_dir = "{folder}"
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 2
num_attention_heads = 2
ffn_type = "kan_glu"
[tokenizer]
vocab_size = 300
[data]
source = "stories"
block_size = 32
max_documents = 150
cache_dir = "{folder}/cache"
streaming = {streaming}
shuffle_buffer = 64
[train]
max_tokens = {tokens}
batch_size = 4
learning_rate = 0.002
log_every = 10
eval_every = 200
eval_tokens = 1024
save_every = 100
num_threads = 1
[tracking]
tracker = "{tracker}"
"""
STEP_TOKENS = 4 * 32
MEMORY_MIB, COUNTS = 20, 2
LOGS = ("metrics.jsonl", "wandb", "kanlm")
"""What grows with every logged step: our own file and the trackers'."""


def folder_bytes(path: Path) -> int:
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # a checkpoint that is being pruned
            continue
    return total


def looked_at(process: psutil.Process, run: Path, step: int) -> dict[str, float]:
    logs = sum(folder_bytes(run / name) for name in LOGS if (run / name).exists())
    return {
        "step": step,
        "resident_mib": round(process.memory_info().rss / 2**20, 1),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "checkpoints": len(list((run / "checkpoints").glob("step-*"))),
        "checkpoint_kib": round(folder_bytes(run / "checkpoints") / 1024, 1),
        "log_kib": round(logs / 1024, 1),
    }


def last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def grown(seen: list[dict[str, float]], steps: int) -> list[str]:
    """What is larger at the end than the rules allow, in both of the last two looks."""
    settled = [look for look in seen if look["step"] >= 0.2 * steps]
    first, end = settled[: max(2, len(settled) // 5)], settled[-2:]
    limits = {"resident_mib": MEMORY_MIB, "descriptors": COUNTS, "threads": COUNTS, "checkpoints": 1}
    return [
        f"{name}: {max(look[name] for look in first)} -> {min(look[name] for look in end)}"
        for name, limit in limits.items()
        if min(look[name] for look in end) > max(look[name] for look in first) + limit
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument(
        "--tracker", default="tensorboard", choices=["none", "tensorboard", "wandb", "trackio"]
    )
    parser.add_argument("--streaming", action="store_true", help="tokenise while training")
    parser.add_argument("--out", type=Path, help="JSON file for every look")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="kanlm-soak-") as folder:
        config, run = Path(folder) / "soak.toml", Path(folder) / "soak"
        tokens = arguments.steps * STEP_TOKENS
        config.write_text(
            CONFIG.format(
                folder=folder,
                tokens=tokens,
                tracker=arguments.tracker,
                streaming=str(arguments.streaming).lower(),
            )
        )
        started = time.monotonic()
        with open(Path(folder) / "log", "w") as log:
            training = subprocess.Popen(
                [sys.executable, "-m", "kanlm", "train", str(config)], stdout=log, stderr=log
            )
        seen: list[dict[str, float]] = []
        process = psutil.Process(training.pid)
        while training.poll() is None:
            step = last_step(run / "metrics.jsonl")
            if step >= (seen[-1]["step"] if seen else 0) + arguments.steps / 50:
                try:
                    seen.append(looked_at(process, run, step))
                except psutil.NoSuchProcess:
                    break
            time.sleep(0.2)
        if training.wait() != 0:
            print((Path(folder) / "log").read_text()[-3000:], file=sys.stderr)
            return 1
        names = list(seen[0])
        print(" | ".join(names))
        for look in seen[:: max(1, len(seen) // 10)] + seen[-1:]:
            print(" | ".join(str(look[name]) for name in names))
        growth = grown(seen, arguments.steps)
        result = {
            "steps": arguments.steps,
            "tracker": arguments.tracker,
            "streaming": arguments.streaming,
            "seconds": round(time.monotonic() - started),
            "grown": growth,
            "looks": seen,
            "provenance": provenance(),
        }
        if arguments.out:
            write_json(arguments.out, result)
        print("flat" if not growth else f"grown: {'; '.join(growth)}")
        return 1 if growth else 0


if __name__ == "__main__":
    sys.exit(main())
