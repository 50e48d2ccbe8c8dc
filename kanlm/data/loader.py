"""Training batches whose order depends on (data_seed, consumed sequences) alone.

Legend: B sequences of a micro-batch, T tokens of a sequence.

Sequence number n is one block of T consecutive ids; `Mixture` says which source it is from and how many that
source has given before. An epoch of a source is a permutation of its blocks (streaming: of every window).
Micro-batch number i of rank r holds the sequences (i * world_size + r) * B + [0, B), so any number of
processes sees the same sequences in the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kanlm.config import RunConfig, UserError
from kanlm.data.cache import TokenCache, train_caches
from kanlm.data.corpus import split_sources
from kanlm.data.exchange import Exchange
from kanlm.data.order import Mixture, permute
from kanlm.data.packing import Packer
from kanlm.data.stream import STREAM_PLACES, StreamedBlocks
from kanlm.data.tokenizer import tokenizer_hash
from kanlm.runs import json_sha256


class TokenLoader:
    """Endless micro-batches of the training text for one process.

    Yields dicts of `input_ids` [B, T] int64; `labels` [B, T] int64, the same ids unshifted, as transformers'
    causal models take them (position t is scored against labels[t + 1]; T - 1 targets a sequence, no mask);
    and, with `data.cross_document_attention = false`, `position_ids` [B, T] that restart at every document,
    which those models turn into block-diagonal attention. A document begins with EOS, so no target needs a
    mask: a document's first token is predicted from its EOS, and the next EOS from the end of the document.

    `micro_batch_size` defaults to the configured one, else to batch_size / world_size. `exchange` divides the
    work of tokenising a stream among the processes, which then have to take micro-batches in step.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        exchange: Exchange | None = None,
    ):
        assert 0 <= rank < world_size
        self.rank, self.world_size = rank, world_size
        self.micro_batch_size = micro_batch_size or config.train.micro_batches(world_size)[0]
        self.consumed = 0
        """Sequences that all processes together have been given."""
        self._eos, self._block_size = tokenizer.eos_token_id, config.data.block_size
        self._in_step = exchange is not None
        self._apart = not config.data.cross_document_attention
        specs = [spec for spec in config.data.mixture if spec.weight > 0]
        weights = [spec.weight for spec in specs] or [1.0]
        self._mixture = Mixture(weights, config.data_seed)
        self._sources: Sequence[_CachedBlocks | StreamedBlocks]
        self._streams: list[StreamedBlocks] = []
        if config.data.streaming:
            pack, window = Packer(tokenizer), config.data.shuffle_buffer
            self._sources = self._streams = [
                StreamedBlocks(source, pack, self._block_size, window, (config.data_seed, number), exchange)
                for number, source in enumerate(split_sources(config.data, "train"))
            ]
            self.manifest = _streamed_manifest(self._streams, tokenizer)
        else:
            self._sources = cached = [
                _CachedBlocks(cache, self._block_size, (config.data_seed, number))
                for number, cache in enumerate(train_caches(config, tokenizer))
            ]
            self.manifest = _cached_manifest([source.cache.manifest for source in cached])
        self._identity = {
            "data_seed": config.data_seed,
            "data.block_size": self._block_size,
            "data.mixture weights": weights,
            "data.streaming": config.data.streaming,
        }
        if config.data.streaming:
            self._identity["data.shuffle_buffer"] = config.data.shuffle_buffer
            self._identity["kind of place in a stream"] = STREAM_PLACES
        self._identity["sha256 of the data manifest (text and tokenizer)"] = self.manifest["sha256"]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            first = self.consumed + self.rank * self.micro_batch_size
            batch = self._batch(np.arange(first, first + self.micro_batch_size))
            self.consumed += self.micro_batch_size * self.world_size
            if self._in_step:
                self._pass_to(self.consumed)
            yield batch

    def _pass_to(self, consumed: int) -> None:
        """Bring every stream to the window of its last block before sequence `consumed`, in all processes
        alike.
        """
        for stream, given in zip(self._streams, self._mixture.counts(consumed), strict=True):
            if given:
                stream.pass_to(int(given) - 1)

    def state_dict(self) -> dict[str, Any]:
        """The place of the next micro-batch, JSON only. Any process's state serves all, of any number."""
        state = {"consumed": self.consumed, "identity": self._identity}
        if self.manifest["streaming"]:
            state["streams"] = [stream.state_dict() for stream in self._streams]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state`; `UserError` that names what differs where it is the state of other data."""
        for name in self._identity | state["identity"]:
            ours, theirs = self._identity.get(name), state["identity"].get(name)
            if ours != theirs:
                raise UserError(
                    f"{name}: {ours!r}, but the run to resume was trained with {theirs!r}; restore it, or "
                    "start a new run under another name"
                )
        self.consumed = state["consumed"]
        for stream, place in zip(self._streams, state.get("streams", ()), strict=True):
            stream.load_state_dict(place)

    def _batch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        ids = np.empty((len(numbers), self._block_size), dtype=np.int64)  # [B, T]
        sources, indices = self._mixture(numbers)
        for number, source in enumerate(self._sources):
            here = sources == number
            if here.any():
                ids[here] = source.blocks(indices[here])
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
        if self._apart:
            places = np.arange(self._block_size)
            starts = np.maximum.accumulate(np.where(ids == self._eos, places, 0), axis=1)  # [B, T]
            batch["position_ids"] = torch.from_numpy(places - starts)
        return batch


class _CachedBlocks:
    """Blocks of a token cache by their number; every epoch is a permutation of them."""

    def __init__(self, cache: TokenCache, block_size: int, key: tuple[int, ...]):
        self.cache, self._block_size, self._key = cache, block_size, key
        self._number = len(cache) // block_size
        if not self._number:
            raise UserError(
                f"data.block_size: {block_size}, but the training text of {cache.manifest['source']!r} has "
                f"only {len(cache)} tokens; choose a smaller block_size or a longer text"
            )

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """[N, T] int64: the blocks number `indices` [N], counted over all epochs."""
        epochs, places = np.divmod(indices, self._number)
        result = np.empty((len(indices), self._block_size), dtype=np.int64)
        for epoch in np.unique(epochs):
            (here,) = np.nonzero(epochs == epoch)
            order = permute(places[here], self._number, (*self._key, int(epoch)))
            for row, block in zip(here, order.tolist(), strict=True):
                result[row] = self.cache.tokens(block * self._block_size, (block + 1) * self._block_size)
        return result


def _cached_manifest(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a single cache its own manifest; of a mixture sums, and a hash over the caches' hashes."""
    if len(manifests) == 1:
        return manifests[0] | {"streaming": False}
    sums = {
        name: sum(manifest[name] for manifest in manifests)
        for name in ("tokens", "text_tokens", "bytes", "words", "documents")
    }
    return sums | {
        "streaming": False,
        "split": "train",
        "source": ", ".join(manifest["source"] for manifest in manifests),
        "licence": ", ".join(dict.fromkeys(manifest["licence"] for manifest in manifests)),
        "sha256": json_sha256([manifest["sha256"] for manifest in manifests]),
        "sources": manifests,
    }


def _streamed_manifest(streams: list[StreamedBlocks], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Counts are unknown before a stream ends; sha256 covers the sources' fingerprints and the tokenizer."""
    sources = [stream.source for stream in streams]
    return {
        "streaming": True,
        "split": "train",
        "source": ", ".join(source.name for source in sources),
        "licence": ", ".join(dict.fromkeys(source.reader.licence for source in sources)),
        "sha256": json_sha256([tokenizer_hash(tokenizer), *(source.fingerprint for source in sources)]),
    }
