"""Texts to token ids, in batches, by several threads or processes.

    documents -> `Packer.fragments` (at most about FRAGMENT_CHARACTERS) -> parts -> `Packed`, in order

A document becomes the eos id followed by its own ids, so a stream of documents reads EOS a EOS b EOS c: the
end of a document is predicted from the document, and its first token from EOS.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kanlm.data.text import WORD_BEGINS, Text, cut_at_words
from kanlm.data.tokenizer import packing_tokenizer
from kanlm.metrics import TextCounts

BATCH_CHARACTERS = 1 << 17
PIECE_CHARACTERS = 1 << 14
FRAGMENT_CHARACTERS = 1 << 20
"""What is held of a document at a time, where its tokenizer allows that."""
MAX_THREADS = 16
"""Beyond these the interpreter's lock is the limit, and processes (data.num_workers) are faster."""


@dataclass(frozen=True)
class Fragment:
    """Part of a document, or all of it."""

    text: str
    number: int = 0
    """How many fragments of the document come before it."""
    last: bool = True
    ends_shard: bool = False

    def counts(self) -> TextCounts:
        """Sizes that add up to those of the document (`kanlm.metrics.text_counts`)."""
        text, first, last = self.text, self.number == 0, self.last
        words = len(text.split()) if text else 1
        words += last and text[-1:].isspace()
        words += text[:1].isspace() if first else -(not text[:1].isspace())  # or the word before goes on
        return TextCounts(int(first), len(text.encode("utf-8")), words, text.count("\n"))


@dataclass(frozen=True)
class Packed:
    """Fragments of one batch: ids of all of them in a row, and how many each has (eos included).

    Of a `Part` that begins in the middle of a fragment, the first length is that of the fragment's rest.
    """

    ids: np.ndarray
    lengths: np.ndarray
    begins: np.ndarray
    """[fragments] whether a document begins with it, and so an EOS."""
    counts: TextCounts
    ends_shard: bool = False

    @property
    def starts(self) -> np.ndarray:
        """Places of the documents' EOS in `ids`."""
        return (np.cumsum(self.lengths) - self.lengths)[self.begins]


@dataclass(frozen=True)
class Part:
    """Consecutive pieces of consecutive fragments."""

    pieces: list[str] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    """Those of the pieces that begin a fragment."""
    fragments: list[Fragment] = field(default_factory=list)
    """Those that begin here, whole."""
    ends_shard: bool = False

    @property
    def whole(self) -> bool:
        """Whether the first piece begins a fragment."""
        return self.firsts[:1] == [0]


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

    def __call__(self, fragments: Sequence[Fragment]) -> Packed:
        """One Packed for `fragments`, in this thread or, as the tokenizer likes, in threads of its own."""
        size = sum(len(fragment.text) for fragment in fragments)
        (part,) = self._parts(fragments, batch_characters=size + 1)
        return self.encode(part)

    def fragments(self, texts: Iterable[Text]) -> Iterator[Fragment]:
        """`texts` in order, long ones in fragments with the same ids as the whole has.

        A tokenizer that looks further than a word gets documents whole; only one that stays on the disk is
        cut for it too, at line ends where there are some. UserError for a word too long for any cut.
        """
        for text in texts:
            if isinstance(text, str) and (len(text) <= FRAGMENT_CHARACTERS or not self._cuts):
                yield Fragment(text)
            else:
                yield from _numbered(cut_at_words(text, FRAGMENT_CHARACTERS, strict=self._cuts))

    def encode(self, part: Part) -> Packed:
        """The ids of `part`, an EOS before each document that begins in it."""
        encodings = self._backend.encode_batch(part.pieces, add_special_tokens=False)
        ids = np.fromiter(  # twice as fast as np.array
            itertools.chain.from_iterable(encoding.ids for encoding in encodings), dtype=self.dtype
        )
        ends = np.cumsum([0, *map(len, encodings)])
        starts = ends[part.firsts]
        begins = np.array([fragment.number == 0 for fragment in part.fragments], dtype=bool)
        lengths = np.diff(starts, append=ends[-1]) + begins
        ids = np.insert(ids, starts[begins], self._eos)
        if not part.whole:
            lengths = np.concatenate([starts[:1] if len(starts) else ends[-1:], lengths])
            begins = np.concatenate([[False], begins])
        counts = sum((fragment.counts() for fragment in part.fragments), TextCounts())
        return Packed(ids, lengths, begins, counts, part.ends_shard)

    def pack(self, fragments: Iterable[Fragment], num_workers: int = 0) -> Iterator[Packed]:
        """`fragments` in order, in batches of whole ones, encoded while this thread reads on: by
        `num_workers` processes, or where these are fewer than two by as many threads as there are cores."""
        with self._pool(num_workers) as (pool, encode, width):
            waiting: deque[tuple[bool, Future[Packed]]] = deque()
            begun: list[Packed] = []
            try:
                for part in self._parts(fragments, BATCH_CHARACTERS):
                    waiting.append((part.whole, pool.submit(encode, part)))
                    if len(waiting) > 2 * width:
                        yield from _whole_fragments(begun, *waiting.popleft())
                while waiting:
                    yield from _whole_fragments(begun, *waiting.popleft())
                if begun:
                    yield _joined(begun)
            finally:
                for _, future in waiting:
                    future.cancel()

    def _parts(self, fragments: Iterable[Fragment], batch_characters: int) -> Iterator[Part]:
        """Consecutive pieces of about `batch_characters` together; long fragments span several."""
        part, size = Part(), 0
        for fragment in fragments:
            part.firsts.append(len(part.pieces))
            part.fragments.append(fragment)
            for piece in pieces(fragment.text) if self._cuts else (fragment.text,):
                if size >= batch_characters:
                    yield part
                    part, size = Part(), 0
                part.pieces.append(piece)
                size += len(piece)
            if fragment.ends_shard or size >= batch_characters:
                yield replace(part, ends_shard=fragment.ends_shard)
                part, size = Part(), 0
        if part.pieces:
            yield part

    @contextmanager
    def _pool(self, num_workers: int) -> Iterator[tuple[Executor, Callable[[Part], Packed], int]]:
        if num_workers < 2:
            width = min(len(os.sched_getaffinity(0)), MAX_THREADS)
            with _serial_calls(), ThreadPoolExecutor(width, thread_name_prefix="packing") as threads:
                yield threads, self.encode, width
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(num_workers, context, _start_worker, (self,)) as processes:
                yield processes, _encode_in_worker, num_workers


def _whole_fragments(begun: list[Packed], whole: bool, future: Future[Packed]) -> Iterator[Packed]:
    """Add a result to those `begun`; what these hold comes out where their last fragment has ended."""
    if whole and begun:
        yield _joined(begun)
        begun.clear()
    begun.append(future.result())


def _joined(parts: list[Packed]) -> Packed:
    """Parts of which each but the first goes on with the last fragment of the one before."""
    lengths = list(parts[0].lengths)
    for part in parts[1:]:
        lengths[-1] += part.lengths[0]
        lengths.extend(part.lengths[1:])
    return Packed(
        np.concatenate([part.ids for part in parts]),
        np.array(lengths, dtype=np.int64),
        np.concatenate([parts[0].begins, *(part.begins[1:] for part in parts[1:])]),
        sum((part.counts for part in parts), TextCounts()),
        parts[-1].ends_shard,
    )


def _numbered(texts: Iterator[str]) -> Iterator[Fragment]:
    number, text = 0, next(texts)
    for following in texts:
        yield Fragment(text, number, last=False)
        number, text = number + 1, following
    yield Fragment(text, number)


@contextmanager
def _serial_calls() -> Iterator[None]:
    """Each call of a tokenizer stays in its thread: with a part for each thread that was faster, measured,
    than the library's own threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


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
    no token spans such a cut, and several threads can share one long document.
    """
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    cuts = [0]
    while found := WORD_BEGINS.search(text, cuts[-1] + PIECE_CHARACTERS):
        cuts.append(found.start())
    return [text[start:stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


_worker_packer: Packer


def _start_worker(packer: Packer) -> None:
    global _worker_packer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_packer = packer


def _encode_in_worker(part: Part) -> Packed:
    return _worker_packer.encode(part)
