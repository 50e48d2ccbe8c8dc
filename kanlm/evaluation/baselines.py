"""What a neural model must beat: an n-gram model and a compressor, in bits per byte of the held-out text."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kanlm.config import UserError


class KneserNey:
    """Interpolated Kneser-Ney n-gram model over integer symbols 0 .. vocab_size - 1 (Kneser & Ney 1995).

    One absolute discount per order, n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994); lower orders count distinct
    left neighbours instead of occurrences; the unigram is interpolated with the uniform distribution, so that
    every symbol has a probability and the probabilities sum to one. Documents are independent.

    A gram of k symbols is one integer: the rank of its last k - 1 symbols, times A, plus its first symbol.
    """

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int, order: int = 5):
        if order < 1:
            raise UserError(f"order: expected at least 1, got {order}")
        self.vocab_size = vocab_size
        self.order = order
        self._alphabet = vocab_size + 1  # A: the symbols and the boundary between documents
        symbols = self._stream(documents)
        targets = np.flatnonzero(symbols < vocab_size)
        if not len(targets):
            raise UserError("data: the training text is empty; an n-gram model needs at least one symbol")

        self._grams: list[NDArray] = []  # sorted integers of the grams of each order, 1 .. n
        ranks = [np.zeros(len(symbols), dtype=np.int64)]  # order 0: the empty gram
        for k in range(1, order + 1):
            keys, rank = np.unique(self._keys(symbols, ranks[-1], k), return_inverse=True)
            self._grams.append(keys)
            ranks.append(rank)

        self._discounted: list[NDArray] = []  # max(count - D, 0) of each gram
        self._totals: list[NDArray] = []  # sum of counts after each context
        self._backoff: list[NDArray] = []  # D * distinct successors of each context
        for k in range(1, order + 1):
            seen, first, occurrences = np.unique(ranks[k][targets], return_index=True, return_counts=True)
            place = targets[first]
            counts = occurrences.astype(float)
            if k < order:
                longer = np.unique(ranks[k + 1][targets])
                left_neighbours = np.bincount(
                    self._grams[k][longer] // self._alphabet, minlength=len(self._grams[k - 1])
                )
                starts_document = symbols[place - k + 1] == vocab_size  # nothing stands to its left
                counts = np.where(starts_document, counts, left_neighbours[seen])
            discount = _discount(counts)
            contexts = ranks[k - 1][place - 1]
            num_contexts = len(self._grams[k - 2]) if k > 1 else 1
            discounted = np.zeros(len(self._grams[k - 1]))
            discounted[seen] = counts - discount
            self._discounted.append(discounted)
            self._totals.append(np.bincount(contexts, weights=counts, minlength=num_contexts))
            self._backoff.append(discount * np.bincount(contexts, minlength=num_contexts))

    def _stream(self, documents: Iterable[Sequence[int]]) -> NDArray:
        """Documents joined, each after n boundary symbols."""
        boundary = np.full(self.order, self.vocab_size, dtype=np.int64)
        pieces = [boundary]
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)
            if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
                raise UserError(f"data: a symbol lies outside 0 .. {self.vocab_size - 1}")
            pieces += [ids, boundary]
        return np.concatenate(pieces)

    def _keys(self, symbols: NDArray, shorter: NDArray, k: int) -> NDArray:
        """Integer of the k-gram that ends at each place; -1 where its last k - 1 symbols are unknown."""
        first = np.full(len(symbols), self.vocab_size, dtype=np.int64)
        first[k - 1 :] = symbols[: len(symbols) - k + 1]
        return np.where(shorter < 0, -1, shorter * self._alphabet + first)

    def log_probabilities(self, documents: Iterable[Sequence[int]]) -> NDArray:
        """ln p of every symbol of the documents, in order."""
        symbols = self._stream(documents)
        targets = np.flatnonzero(symbols < self.vocab_size)
        probability = np.full(len(targets), 1.0 / self.vocab_size)
        context_rank = np.zeros(len(symbols), dtype=np.int64)
        for k in range(1, self.order + 1):
            known = self._grams[k - 1]
            keys = self._keys(symbols, context_rank, k)
            rank = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            rank = np.where(known[rank] == keys, rank, -1)
            context = context_rank[targets - 1]
            total = np.where(context < 0, 0.0, self._totals[k - 1][context])
            gram = rank[targets]
            discounted = np.where(gram < 0, 0.0, self._discounted[k - 1][gram])
            seen = total > 0
            probability[seen] = (
                discounted[seen] + self._backoff[k - 1][context[seen]] * probability[seen]
            ) / total[seen]
            context_rank = rank
        return np.log(probability)


def _discount(counts: NDArray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    if once == 0 or twice == 0:  # the estimate is 0 or 1 there; 0.75 is the customary value
        return min(0.75, float(counts.min()))
    return once / (once + 2 * twice)


def kneser_ney_bits_per_byte(training: Iterable[str], held_out: Iterable[str], order: int = 5) -> float:
    """Bits per byte of an n-gram model over UTF-8 bytes; training takes seconds a megabyte."""
    model = KneserNey((_byte_ids(text) for text in training), vocab_size=256, order=order)
    nll = -model.log_probabilities(_byte_ids(text) for text in held_out)
    if not len(nll):
        raise UserError("data: the held-out text is empty")
    return float(nll.mean()) / math.log(2)


def xz_bits_per_byte(training: Iterable[str], held_out: Iterable[str]) -> float:
    """Bits per byte that the held-out text adds to xz -9's archive of the training text (64 MiB window)."""
    first = "".join(training).encode("utf-8")
    second = "".join(held_out).encode("utf-8")
    if not second:
        raise UserError("data: the held-out text is empty")
    added = len(lzma.compress(first + second, preset=9)) - len(lzma.compress(first, preset=9))
    return 8 * added / len(second)


def _byte_ids(text: str) -> NDArray:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
