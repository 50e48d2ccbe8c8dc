"""Flipped bits and truncated files in every artifact: detected and named, or without any effect?"""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from life import Life

READS = {
    "resume": ("cache", "run"),
    "export": ("run",),
    "eval": ("run/hf",),
    "report": ("study",),
}
"""What a stage reads."""
NO_CHECKSUM = ("run/run.json", "run/metrics.jsonl", "run/config.json", "run/tokenizer", "study")
"""Where a damage that leaves a valid file is not detected: what docs/training.md lists."""


def damaged(path: Path, rng: random.Random) -> str:
    """Flip a bit of `path`, or cut its end off; what was done."""
    content = bytearray(path.read_bytes())
    if rng.random() < 0.4:
        size = rng.randrange(len(content))
        path.write_bytes(content[:size])
        return f"cut to {size} of {len(content)} bytes"
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {len(content)}"


def outcome(life: Life, stage, path: Path) -> tuple[str, str]:
    """What became of a stage with the damaged `path`, and what was said."""
    status, told = life.ran(stage.command)
    errors = [line for line in told.splitlines() if line.startswith("kanlm: error: ")]
    if status == 0:
        if life.result(stage.name) == life.expected[stage.name]:
            return "harmless", told
        return ("named, and gone on" if str(path) in told else "UNDETECTED"), told
    if status != 2 or len(errors) != 1 or "Traceback" in told:
        return f"NOT ONE LINE (status {status})", told
    near = (path.name, path.parent.name, path.parent.parent.name)
    return ("named" if any(name in errors[0] for name in near) else "TOLD WITHOUT ITS NAME"), told


def run(life: Life, number: int, seed: int) -> int:
    """`number` damages, each to a fresh copy; prints what was not detected. 1 where something was not."""
    rng = random.Random(seed)
    stages = [stage for stage in life.stages if stage.name in READS]
    outcomes: collections.Counter[str] = collections.Counter()
    missed: collections.Counter[str] = collections.Counter()
    for count in range(number):
        stage = stages[count % len(stages)]
        life._restored(stage.base)
        places = [life.work / place for place in READS[stage.name]]
        files = sorted(path for place in places for path in place.rglob("*") if path.is_file())
        path = rng.choice([path for path in files if path.stat().st_size and path.suffix != ".lock"])
        done = damaged(path, rng)
        verdict, told = outcome(life, stage, path)
        if verdict == "UNDETECTED" and str(path.relative_to(life.work)).startswith(NO_CHECKSUM):
            verdict = "undetected, as documented"
        outcomes[verdict] += 1
        if verdict[0].isupper():
            name = f"{stage.name}: {path.relative_to(life.work)}"
            missed[f"{verdict}: {name}"] += 1
            print(f"{verdict}: {name}, {done}\n{told.strip()[-800:]}\n", flush=True)
    print(f"{number} damages: {dict(outcomes)}")
    for name, times in sorted(missed.items()):
        print(f"  {times} x {name}")
    return int(bool(missed))
