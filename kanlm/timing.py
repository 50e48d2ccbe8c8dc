"""Times taken in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds_of(step: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of a call, with what it has a GPU do."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def take_turns(
    steps: Sequence[Callable[[], Any]], go_on: Callable[[int], bool], device: str = "cpu"
) -> list[list[float]]:
    """Seconds of each of `steps` in each round, while `go_on(rounds done)`.

    Every round runs every step once, in an order that turns.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    done = 0
    while go_on(done):
        for place in range(len(steps)):
            index = (place + done) % len(steps)
            seconds[index].append(seconds_of(steps[index], device))
        done += 1
    return seconds
