"""The tokens of a run, and the micro-batches of one optimiser step after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig
from kanlm.data import TokenCache, TokenLoader, token_cache, tokenizer_for
from kanlm.train.parallel import new_exchange

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Text:
    """The tokens of a run."""

    tokenizer: PreTrainedTokenizerFast
    batches: StepBatches
    validation: TokenCache


def read_text(
    config: RunConfig, accelerator: Accelerator, micro_batch_size: int, accumulation_steps: int
) -> Text:
    """Tokenizer and tokens, made by the main process and read by the others."""
    exchange = new_exchange(accelerator) if config.data.streaming else None
    with accelerator.main_process_first():
        tokenizer = tokenizer_for(config)
        loader = TokenLoader(
            config,
            tokenizer,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            micro_batch_size=micro_batch_size,
            exchange=exchange,
        )
        batches = StepBatches(loader, accumulation_steps)
        return Text(tokenizer, batches, token_cache(config, tokenizer, "validation"))


class StepBatches:
    """The micro-batches of one step after the other."""

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

    def take(self) -> tuple[list[Batch], dict[str, Any], float]:
        """Those of a step, the loader's state after them, and the seconds that the thread which trains has
        spent on reading since the last call.
        """
        if self._ahead is None:
            self.read_ahead()
        assert self._ahead is not None
        (micro_batches, state), self._ahead = self._ahead, None
        seconds, self._seconds = self._seconds, 0.0
        return micro_batches, state, seconds
