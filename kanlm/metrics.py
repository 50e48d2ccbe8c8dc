"""Language-model metrics from sums: divide last, never average averages. No torch.

With N = the sum of -ln p over the scored tokens of a text of B UTF-8 bytes and W words:
loss = N / tokens (nats/token); perplexity = exp(loss); word perplexity = exp(N / W);
bits per byte = N / (B ln 2). The last two compare models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextCounts:
    """Size of a text; adds up over documents."""

    documents: int = 0
    bytes: int = 0
    words: int = 0
    lines: int = 0

    def __add__(self, other: TextCounts) -> TextCounts:
        return TextCounts(
            self.documents + other.documents,
            self.bytes + other.bytes,
            self.words + other.words,
            self.lines + other.lines,
        )


def text_counts(document: str) -> TextCounts:
    r"""Counts of one document.

    bytes: UTF-8. words: `len(re.split(r"\s+", document))`, lm-evaluation-harness' definition, so that word
    perplexities agree; it counts an empty word at each end where the document starts or ends with white
    space. lines: newline characters (WikiText's published word perplexities count one `<eos>` a line).
    """
    return total_counts((document,))


def total_counts(documents: Iterable[str]) -> TextCounts:
    """Sums of `text_counts`, in half the time of adding them."""
    number = num_bytes = words = lines = 0
    for document in documents:
        number += 1
        num_bytes += len(document.encode("utf-8"))
        words += _words(document)
        lines += document.count("\n")
    return TextCounts(number, num_bytes, words, lines)


def _words(document: str) -> int:
    """What the split at white space counts, in a quarter of its time."""
    return len(document.split()) + document[:1].isspace() + document[-1:].isspace() if document else 1


def loss(nll_nats: float, tokens: int) -> float:
    """Nats per token."""
    return _ratio(nll_nats, tokens, "tokens")


def perplexity(nll_nats: float, tokens: int) -> float:
    """exp(nats per token); inf where that overflows."""
    return _exp(loss(nll_nats, tokens))


def word_perplexity(nll_nats: float, words: int) -> float:
    """exp(nats per word); inf where that overflows."""
    return _exp(_ratio(nll_nats, words, "words"))


def bits_per_byte(nll_nats: float, num_bytes: int) -> float:
    """Bits per UTF-8 byte of the original text."""
    return _ratio(nll_nats, num_bytes, "bytes") / math.log(2)


def ratios(nll_nats: float, tokens: int, num_bytes: int, words: int) -> dict[str, float]:
    """The four derived numbers of an evaluation report, by their names there."""
    return {
        "loss": loss(nll_nats, tokens),
        "perplexity": perplexity(nll_nats, tokens),
        "word_perplexity": word_perplexity(nll_nats, words),
        "bits_per_byte": bits_per_byte(nll_nats, num_bytes),
    }


def _ratio(nll_nats: float, count: int, name: str) -> float:
    if count < 1:
        raise ValueError(f"{name}: got {count}; a metric needs a text with at least one of its {name}")
    return nll_nats / count


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
