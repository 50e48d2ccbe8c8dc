"""Training batches in an order that depends on (data_seed, consumed sequences) alone.

Legend: B sequences of a micro-batch, T tokens of a sequence.

Sequence number n of a run is one block of T consecutive ids. Micro-batch number i of rank r holds the sequences
(i * world_size + r) * B + [0, B), so every number of processes sees the same sequences in the same order, and the
number of consumed sequences is the whole state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data.cache import train_caches

_MASK = (1 << 64) - 1
SCHEDULE = 4096
"""Sequences in which the sources of a mixture keep their exact shares."""


class TokenLoader:
    """Endless micro-batches of the training text for one process.

    Yields dicts of `input_ids` [B, T] int64, `labels` [B, T] int64 (the same ids, unshifted, as transformers'
    causal models take them: position t is scored against labels[t + 1], so T - 1 targets a sequence) and, where
    `data.cross_document_attention` is false, `position_ids` [B, T] that restart at every document. A document
    begins with its EOS: the end of a document is predicted from within it, and its first token from EOS alone.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ):
        self.rank, self.world_size = rank, world_size
        self.micro_batch_size = (
            micro_batch_size or config.train.micro_batch_size or config.train.batch_size // world_size
        )
        self.block_size = config.data.block_size
        self.seed = config.data_seed
        self.keep_documents_apart = not config.data.cross_document_attention
        self.eos_token_id = tokenizer.eos_token_id
        self.caches = train_caches(config, tokenizer)
        self.consumed = 0
        self.blocks = [len(cache) // self.block_size for cache in self.caches]
        for cache, blocks in zip(self.caches, self.blocks, strict=True):
            if not blocks:
                raise UserError(
                    f"data.block_size: {self.block_size}, but {cache.manifest['source']} has only {len(cache)} training "
                    "tokens; choose a smaller block_size or a longer text"
                )

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the single source."""
        return self.caches[0].manifest

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            first = self.consumed + self.rank * self.micro_batch_size
            self.consumed += self.micro_batch_size * self.world_size
            yield self._batch([self._block(0, n) for n in range(first, first + self.micro_batch_size)])

    def state_dict(self) -> dict[str, Any]:
        """Where the next micro-batch begins; the same in every process."""
        return {"consumed": self.consumed, "sha256": self.manifest["sha256"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sha256"] != self.manifest["sha256"]:
            raise UserError("data: the training tokens differ from those the state was saved with (sha256)")
        self.consumed = state["consumed"]

    def _block(self, source: int, index: int) -> np.ndarray:
        """The `index`-th sequence that this source gives, counted over its epochs."""
        epoch, place = divmod(index, self.blocks[source])
        start = permuted(place, self.blocks[source], (self.seed, source, epoch)) * self.block_size
        return self.caches[source].tokens(start, start + self.block_size)

    def _batch(self, blocks: list[np.ndarray]) -> dict[str, Tensor]:
        ids = np.stack(blocks)  # [B, T]
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
        if self.keep_documents_apart:
            places = np.arange(self.block_size)
            starts = np.where(ids == self.eos_token_id, places, 0)
            batch["position_ids"] = torch.from_numpy(places - np.maximum.accumulate(starts, axis=1))
        return batch


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where `index` lands under a pseudo-random permutation of range(size) chosen by `key`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): no memory, any index at once.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    seed = 0
    for part in key:
        seed = _mixed(seed ^ part)
    while True:
        left, right = index >> half, index & mask
        for turn in range(6):
            left, right = right, left ^ (_mixed(seed + (turn << 56) + right) & mask)
        index = left << half | right
        if index < size:
            return index


def _mixed(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
