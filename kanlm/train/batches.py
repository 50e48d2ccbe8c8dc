"""The micro-batches of one optimiser step after the other."""

from __future__ import annotations

import time
from typing import Any

import torch

from kanlm.data import TokenLoader

Batch = dict[str, torch.Tensor]


class StepBatches:
    """The micro-batches of one step after the other, with the loader's state after them."""

    def __init__(self, loader: TokenLoader, accumulation_steps: int):
        self.loader, self.accumulation_steps = loader, accumulation_steps
        self._iterator = iter(loader)
        self._ahead: tuple[list[Batch], dict[str, Any]] | None = None
        self._seconds = 0.0

    def read_ahead(self) -> None:
        """Read the next step's, for instance while a GPU is at work on this one's."""
        started = time.perf_counter()
        self._ahead = [next(self._iterator) for _ in range(self.accumulation_steps)], self.loader.state_dict()
        self._seconds += time.perf_counter() - started

    def take(self) -> tuple[list[Batch], dict[str, Any]]:
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        taken, self._ahead = self._ahead, None
        return taken

    def seconds_spent(self) -> float:
        """Seconds that the thread which trains has spent on reading since the last call."""
        spent, self._seconds = self._seconds, 0.0
        return spent
