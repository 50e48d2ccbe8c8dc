"""Training blocks of a source that is tokenised while it is read, shuffled within windows.

Blocks are cut from the packed documents in order; every window of `data.shuffle_buffer` blocks is permuted.
The place in the stream is that of the window's first token (a document, a fragment of it and a token within
that), so resuming packs one window again and gives the same blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from kanlm.config import UserError
from kanlm.data.corpus import Source, TextStream
from kanlm.data.exchange import Exchange
from kanlm.data.order import permute
from kanlm.data.packing import Fragment, Packer

_BATCH_CHARACTERS = 1 << 18
STREAM_PLACES = 2
"""Raise it when an older state can no longer be read."""


@dataclass(frozen=True)
class _Window:
    first: int
    """Number of blocks before this window, over all epochs."""
    blocks: np.ndarray
    """[N, T] ids in the order of the text."""
    state: dict[str, Any]


class StreamedBlocks:
    """Blocks by their number, in rising order; a thread packs the next window while this one is used.

    With an `exchange` other processes pack a share of it. Then nothing is read before the first block is
    asked for, and all processes have to pass the same windows (`pass_to`), as each waits for what the others
    make.
    """

    _window: _Window | None
    _next: Future[_Window]

    def __init__(
        self,
        source: Source,
        pack: Packer,
        block_size: int,
        window: int,
        key: tuple[int, ...],
        exchange: Exchange | None = None,
    ):
        self.source, self.key = source, key
        self._pack, self._block_size, self._size = pack, block_size, window
        self._exchange, self._starts = exchange, 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")
        self._start({"first": 0, "epoch": 0, "text": None, "offset": 0})

    def blocks(self, indices: np.ndarray) -> np.ndarray:
        """[N, T] int64: the blocks number `indices` [N], none before the current window."""
        result = np.empty((len(indices), self._block_size), dtype=np.int64)
        todo = np.arange(len(indices))
        while len(todo):
            window = self._opened()
            here = todo[indices[todo] < window.first + len(window.blocks)]
            if len(here):
                places = indices[here] - window.first
                order = permute(places, len(window.blocks), (*self.key, window.first))
                result[here] = window.blocks[order]
                todo = todo[len(here) :]
            else:
                self._advance()
        return result

    def pass_to(self, index: int) -> None:
        """Go on to the window of block number `index`, unless it is the current one or passed."""
        window = self._opened()
        while index >= window.first + len(window.blocks):
            window = self._advance()

    def state_dict(self) -> dict[str, Any]:
        return self._window.state if self._window is not None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._window is not None:
            self._next.result()
        self._start(state)

    def _start(self, state: dict[str, Any]) -> None:
        self._state, self._window = state, None
        self._starts += 1
        if self._exchange is None:  # a text too short is told at once
            self._opened()

    def _opened(self) -> _Window:
        if self._window is None:
            self._windows = self._read(self._state)
            self._next = self._thread.submit(next, self._windows)
            return self._advance()
        return self._window

    def _advance(self) -> _Window:
        self._window = self._next.result()
        self._next = self._thread.submit(next, self._windows)
        return self._window

    def _read(self, state: dict[str, Any]) -> Iterator[_Window]:
        """Windows from `state` on, epoch after epoch; an epoch's last incomplete block is dropped."""
        wanted = self._size * self._block_size
        first = state["first"]
        for epoch in itertools.count(state["epoch"]):
            documents = self._documents(state["text"], epoch)
            offset = state["offset"]
            waiting: list[tuple[dict[str, Any], np.ndarray]] = []
            available, ended = -offset, False
            while not ended:
                while available < wanted:
                    found = next(documents, None)
                    if found is None:
                        ended = True
                        break
                    waiting.append(found)
                    available += len(found[1])
                number = min(available // self._block_size, self._size)
                if not number:
                    break
                used = number * self._block_size
                ids = np.concatenate([ids for _, ids in waiting])
                place = {"first": first, "epoch": epoch, "text": waiting[0][0], "offset": offset}
                yield _Window(first, ids[offset : offset + used].reshape(number, self._block_size), place)
                first += number
                available -= used
                offset += used
                while waiting and offset >= len(waiting[0][1]):
                    offset -= len(waiting.pop(0)[1])
            if not first:
                raise UserError(
                    f"data.block_size: {self._block_size}, but the training text of {self.source.name!r} has "
                    "fewer tokens; choose a smaller block_size or a longer text"
                )
            state = {"text": None, "offset": 0}

    def _documents(
        self, state: dict[str, Any] | None, epoch: int
    ) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """(place of a fragment, its ids) from the place `state` on."""
        placed = self._fragments(state)
        for number in itertools.count():
            places: list[dict[str, Any]] = []
            batch: list[Fragment] = []
            size = 0
            for place, fragment in placed:
                places.append(place)
                batch.append(fragment)
                size += len(fragment.text)
                if size >= _BATCH_CHARACTERS:
                    break
            if not batch:
                return
            ids, lengths = self._ids(batch, epoch, number)
            yield from zip(places, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)

    def _ids(self, batch: list[Fragment], epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all of `batch` in a row, and how many each fragment has."""

        def made() -> tuple[np.ndarray, np.ndarray]:
            packed = self._pack(batch)
            return packed.ids, packed.lengths

        if self._exchange is None:
            return made()
        return self._exchange.ids(f"{self.key}/{self._starts}/{epoch}", number, made)

    def _fragments(self, state: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], Fragment]]:
        texts = TextStream(self.source, state)
        done = state["fragment"] if state else 0
        while True:
            place = texts.state_dict()
            text = next(texts, None)
            if text is None:
                return
            for fragment in itertools.islice(self._pack.fragments((text,)), done, None):
                yield place | {"fragment": fragment.number}, fragment
            done = 0
