"""Texts to token ids, in batches, by the tokenizer's own threads or by several processes.

A document becomes the eos id followed by its own ids, so a stream of documents reads EOS a EOS b EOS c: the
end of a document is predicted from the document, and its first token from EOS.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kanlm.data.tokenizer import packing_tokenizer
from kanlm.metrics import TextCounts, total_counts

BATCH_CHARACTERS = 1 << 20
PIECE_CHARACTERS = 1 << 14
_PIECE_END = re.compile(r"[ \n](?=\S)")


@dataclass(frozen=True)
class Packed:
    """Documents of one batch: ids of all of them in a row, and how many each has (eos included)."""

    ids: np.ndarray
    lengths: np.ndarray
    counts: TextCounts


class Packer:
    """Encodes batches of documents with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = packing_tokenizer(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._cuts = splits_at_words(self._backend)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_backend": self._backend.to_str()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._backend = Tokenizer.from_str(state["_backend"])
        self._backend.encode_special_tokens = True  # to_str() leaves it out

    def __call__(self, texts: list[str]) -> Packed:
        """One Packed for `texts`; the tokenizer spreads them, and pieces of long ones, over its threads."""
        cut = [pieces(text) if self._cuts else [text] for text in texts]
        encodings = iter(
            self._backend.encode_batch(list(itertools.chain.from_iterable(cut)), add_special_tokens=False)
        )
        ids: list[int] = []
        lengths = []
        for parts in cut:
            before = len(ids)
            ids.append(self._eos)
            for _ in parts:
                ids.extend(next(encodings).ids)
            lengths.append(len(ids) - before)
        packed = np.fromiter(ids, dtype=self.dtype, count=len(ids))  # twice as fast as np.array
        return Packed(packed, np.array(lengths, dtype=np.int64), total_counts(texts))

    def packed(self, texts: Iterable[str], num_workers: int = 0) -> Iterator[Packed]:
        """Batches of `texts` in order, encoded while this thread reads on: by `num_workers` processes, or
        where these are fewer than two by the tokenizer's own threads."""
        with self._pool(num_workers) as (pool, encode):
            waiting: deque[Future[Packed]] = deque()
            try:
                for batch in text_batches(texts):
                    waiting.append(pool.submit(encode, batch))
                    if len(waiting) > 2 * max(1, num_workers):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    @contextmanager
    def _pool(self, num_workers: int) -> Iterator[tuple[Executor, Callable[[list[str]], Packed]]]:
        if num_workers < 2:
            with ThreadPoolExecutor(2, thread_name_prefix="packing") as threads:
                yield threads, self
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, context, _start_worker, (self,)) as processes:
                yield processes, _pack_in_worker


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of consecutive texts of about BATCH_CHARACTERS together."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def splits_at_words(backend: Tokenizer) -> bool:
    """Whether `pieces` gives the same ids as the whole text: byte-level BPE with GPT-2's pattern, no more."""
    content = json.loads(backend.to_str())
    words = content["pre_tokenizer"] or {}
    return (
        words.get("type") == "ByteLevel"
        and words.get("use_regex", False)
        and not words.get("add_prefix_space", True)
        and content["normalizer"] is None
        and all(token["special"] for token in content["added_tokens"])
    )


def pieces(text: str) -> list[str]:
    """`text` cut into pieces of about PIECE_CHARACTERS, each before a blank or newline that precedes a word.

    GPT-2's pattern gives the last white-space character before a word to that word or a token of its own, so
    no token spans such a cut, and the tokenizer's threads share one long document.
    """
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    cuts = [0]
    while found := _PIECE_END.search(text, cuts[-1] + PIECE_CHARACTERS):
        cuts.append(found.start())
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


_worker_packer: Packer


def _start_worker(packer: Packer) -> None:
    global _worker_packer
    os.environ["RAYON_NUM_THREADS"] = "1"
    _worker_packer = packer


def _pack_in_worker(texts: list[str]) -> Packed:
    return _worker_packer(texts)
