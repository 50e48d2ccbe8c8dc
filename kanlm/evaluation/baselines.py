"""What a neural model must beat: an n-gram model and a compressor, in bits per byte of the held-out text."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from kanlm.config import UserError


class KneserNey:
    """Interpolated Kneser-Ney n-gram model over integer symbols 0 .. vocab_size - 1 (Kneser & Ney 1995).

    One absolute discount per order, n1 / (n1 + 2 n2) (Ney, Essen & Kneser 1994); lower orders count distinct
    left neighbours instead of occurrences; the unigram is interpolated with the uniform distribution, so that
    every symbol has a probability and the probabilities sum to one. Documents are independent.

    A gram of k symbols is one integer in base A, its last symbol first: x_i A^(k-1) + x_(i-1) A^(k-2) + ...
    Without its last digit it is the gram one shorter, without its first digit the context of x_i.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int] | NDArray],
        vocab_size: int,
        order: int = 5,
        outcomes: int | None = None,
    ):
        """outcomes: what the uniform distribution is over, where symbols that never occur share an id."""
        if order < 1:
            raise UserError(f"order: expected at least 1, got {order}")
        self.vocab_size = vocab_size
        self.outcomes = outcomes or vocab_size
        self.order = order
        self._base = vocab_size + 1  # A: the symbols and the boundary between documents
        if self._base**order >= 2**63:
            raise UserError(
                f"order: {order}-grams of {vocab_size} symbols do not fit 63 bits; lower the order"
            )
        longest = self._longest_grams(documents)
        if not len(longest):
            raise UserError("data: the training text is empty; an n-gram model needs text")
        longest.sort()
        grams, occurrences = _runs(longest)
        counts = occurrences
        self._orders = [self._tables(grams, counts, order)]
        for k in range(order - 1, 0, -1):
            grams, left_neighbours = _runs(grams // self._base)
            occurrences = np.add.reduceat(occurrences, np.cumsum(left_neighbours) - left_neighbours)
            starts_document = grams % self._base == vocab_size  # nothing stands to its left
            counts = np.where(starts_document, occurrences, left_neighbours)
            self._orders.insert(0, self._tables(grams, counts, k))

    def _tables(self, grams: NDArray, counts: NDArray, k: int) -> dict[str, NDArray]:
        """What order k adds: discounted counts by gram; totals and the mass given back, by context."""
        discount = _discount(counts)
        contexts, context = np.unique(grams % self._base ** (k - 1), return_inverse=True)
        return {
            "grams": grams,
            "discounted": counts - discount,
            "contexts": contexts,
            "totals": np.bincount(context, weights=counts),
            "returned": discount * np.bincount(context),
        }

    def _longest_grams(self, documents: Iterable[Sequence[int] | NDArray]) -> NDArray:
        """The n-gram that ends at each symbol; boundaries stand before a document's start."""
        boundary = np.full(self.order, self.vocab_size, dtype=np.int64)
        pieces = [boundary]
        for document in documents:
            ids = np.asarray(document, dtype=np.int64)
            if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
                raise UserError(f"data: a symbol lies outside 0 .. {self.vocab_size - 1}")
            pieces += [ids, boundary]
        symbols = np.concatenate(pieces)
        places = np.flatnonzero(symbols < self.vocab_size)
        grams = np.zeros(len(places), dtype=np.int64)
        for back in range(self.order):
            grams = grams * self._base + symbols[places - back]
        return grams

    def log_probabilities(self, documents: Iterable[Sequence[int] | NDArray]) -> NDArray:
        """ln p of every symbol of the documents, in order."""
        longest, where = np.unique(self._longest_grams(documents), return_inverse=True)
        probability = np.full(len(longest), 1.0 / self.outcomes)
        for k, tables in enumerate(self._orders, 1):
            grams = longest // self._base ** (self.order - k)
            context, known = _places(grams % self._base ** (k - 1), tables["contexts"])
            gram, seen = _places(grams, tables["grams"])
            discounted = np.where(seen, tables["discounted"][gram], 0.0)
            interpolated = discounted + tables["returned"][context] * probability
            probability = np.where(known, interpolated / tables["totals"][context], probability)
        return np.log(probability)[where]


def _runs(ascending: NDArray) -> tuple[NDArray, NDArray]:
    """The distinct values of a sorted array and how often each occurs."""
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[starts], np.diff(starts, append=len(ascending))


def _places(values: NDArray, table: NDArray) -> tuple[NDArray, NDArray]:
    """Index of each value in the sorted table, and whether it is there."""
    index = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return index, table[index] == values


def _discount(counts: NDArray) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    if once == 0 or twice == 0:  # the estimate is 0 or 1 there; 0.75 is the customary value
        return min(0.75, float(counts.min()))
    return once / (once + 2 * twice)


ORDERS = range(3, 9)


def kneser_ney_by_order(
    training: Sequence[str], held_out: Sequence[str], orders: Iterable[int] = ORDERS
) -> dict[int, float]:
    """`kneser_ney_bits_per_byte` of several orders; those whose grams do not fit 63 bits are left out.

    Bytes that the training text has not are one symbol to the counts, so that 8 of them fit.
    """
    seen = np.unique(np.concatenate([_byte_ids(text) for text in training] or [_byte_ids("")]))
    ids = np.full(256, len(seen))
    ids[seen] = np.arange(len(seen))
    found = {}
    for order in orders:
        if (len(seen) + 2) ** order >= 2**63:
            continue
        model = KneserNey((ids[_byte_ids(text)] for text in training), len(seen) + 1, order, outcomes=256)
        nll = -model.log_probabilities(ids[_byte_ids(text)] for text in held_out)
        if not len(nll):
            raise UserError("data: the held-out text is empty")
        found[order] = float(nll.mean()) / math.log(2)
    return found


def kneser_ney_bits_per_byte(training: Iterable[str], held_out: Iterable[str], order: int = 5) -> float:
    """Bits per byte of an n-gram model over UTF-8 bytes; about a second for 5 MB of training text."""
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
    with ThreadPoolExecutor(2) as threads:  # lzma releases the interpreter lock
        alone, together = threads.map(
            lambda text: len(lzma.compress(text, preset=9)), (first, first + second)
        )
    return 8 * (together - alone) / len(second)


def _byte_ids(text: str) -> NDArray:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
