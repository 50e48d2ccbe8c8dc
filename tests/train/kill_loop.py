"""Trains a run in child processes and kills each with SIGKILL: the first ones before their first step, then
every second one while it writes a checkpoint, the others at some moment.

Arguments: a JSON file with the run's table, and the number of kills. At the end the run is left to finish.
Prints a JSON list of what was on disk after each kill. Children are forked from a process that has imported
everything, so that twenty lives take little longer than one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kanlm.config import RunConfig, parse_table
from kanlm.runs import RunDir
from kanlm.train.loop import train


def start(config: RunConfig) -> int:
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        train(config)
        os._exit(0)
    return child


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] != 0


def killed(config: RunConfig, early: bool, in_checkpoint: bool, randomness: random.Random) -> dict:
    run = RunDir(config.run_dir)
    before = set(run.checkpoints.glob("*"))
    child = start(config)
    if early:
        time.sleep(randomness.uniform(0, 0.1))
        return end_of(child, run)
    deadline = time.monotonic() + 60
    while (
        run.checkpoints.is_dir() is False or set(run.checkpoints.glob("step-*")) <= before
    ):  # at least one step
        assert not ended(child), "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get to a checkpoint"
        time.sleep(0.001)
    if in_checkpoint:
        while not any(run.checkpoints.glob(".step-*")):
            assert not ended(child), "the run ended before it could be killed"
    else:
        time.sleep(randomness.uniform(0, 0.1))
    return end_of(child, run)


def end_of(child: int, run: RunDir) -> dict:
    """Kill `child`; how it died and what it left."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "half_written": len(list(run.checkpoints.glob(".step-*"))),
        "checkpoints": sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = parse_table(RunConfig, json.loads(Path(sys.argv[1]).read_text()), "table")
    randomness = random.Random(0)
    kills = int(sys.argv[2])
    lives = [killed(config, kill < kills // 4, kill % 2 == 0, randomness) for kill in range(kills)]
    os.waitpid(start(config), 0)
    print(json.dumps(lives))
