"""Zero-shot last words: the word that ends a passage, which its last sentence alone does not tell.

The score of LAMBADA (Paperno et al. 2016) as language models report it: a word is right if each of its tokens
is the most likely one after the passage; beside it the mean loss of the whole word, which small models move
long before they get words right. A passage longer than the model's context loses its beginning.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kanlm.config import UserError
from kanlm.evaluation.answers import Share, paired_shares, share_of
from kanlm.evaluation.perplexity import Window, load_fast, max_context_length, prefix_token, token_ids
from kanlm.stats import paired_difference


@dataclass(frozen=True)
class Passage:
    context: str
    word: str


@dataclass(frozen=True)
class LastWords:
    """What one model answered, in the order of the file: right or not, and ln 1/p of the word, nats."""

    answers: list[bool]
    nll: list[float]

    @property
    def accuracy(self) -> Share:
        return share_of(self.answers)

    @property
    def nats_per_word(self) -> float:
        return math.fsum(self.nll) / len(self.nll)

    def as_json(self) -> dict[str, Any]:
        return {
            "accuracy": asdict(self.accuracy),
            "nats_per_word": self.nats_per_word,
            "words": len(self.nll),
        }


def read_passages(path: str | Path) -> Iterator[Passage]:
    """Passages of a .jsonl file (also .xz, .gz): an object a line with `context` and `continuation`, or with
    `text`, whose last word is asked (the form of LAMBADA's OpenAI version)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of passages")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                context, word = (
                    row["text"].rsplit(" ", 1) if "text" in row else (row["context"], row["continuation"])
                )
            except (json.JSONDecodeError, KeyError, AttributeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}:{number}: expected an object with context and continuation, e.g. "
                    f'{{"context": "The cat sat on the", "continuation": "mat"}} ({error})'
                ) from None
            yield Passage(context.rstrip(), word.strip())


def score_words(
    model: nn.Module, tokenizer: Any, passages: Iterable[Passage], *, batch_size: int = 32
) -> LastWords:
    """Ask a loaded model for the last word of each passage."""
    if batch_size < 1:
        raise UserError(f"batch_size: expected at least 1 passage, got {batch_size}")
    prefix, longest = prefix_token(model, tokenizer), max_context_length(model)
    model.eval()
    answers: list[bool] = []
    nll: list[float] = []
    remaining = iter(passages)
    while buffer := list(islice(remaining, batch_size)):
        windows = [_window(tokenizer, passage, prefix, longest) for passage in buffer]
        for right, loss in _answered(model, windows):
            answers.append(right)
            nll.append(loss)
    if not answers:
        raise UserError("passages: there is none; expected at least one line")
    return LastWords(answers, nll)


def _window(tokenizer: Any, passage: Passage, prefix: int, longest: int) -> Window:
    """The passage's last `longest` inputs; the targets are the tokens that the word adds to it."""
    context = token_ids(tokenizer, passage.context)
    whole = token_ids(tokenizer, f"{passage.context} {passage.word}")
    shared = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
    targets = whole[shared:]
    if not 1 <= len(targets) <= longest:
        raise UserError(
            f"passages: a last word has {len(targets)} tokens, expected 1 to {longest}: {passage.word!r}"
        )
    return Window(0, [prefix, *whole[:-1]][-longest:], targets)


@torch.inference_mode()
def _answered(model: nn.Module, windows: Sequence[Window]) -> Iterator[tuple[bool, float]]:
    """(right, nats) of each window; padded on the right, which causal attention never sees."""
    device = next(model.parameters()).device
    length = max(len(window.inputs) for window in windows)
    inputs = torch.zeros((len(windows), length), dtype=torch.int64)  # [B, T]
    mask = torch.zeros_like(inputs)
    for row, window in enumerate(windows):
        inputs[row, : len(window.inputs)] = torch.tensor(window.inputs)
        mask[row, : len(window.inputs)] = 1
    logits = model(
        input_ids=inputs.to(device), attention_mask=mask.to(device), use_cache=False
    ).logits  # [B, T, V]
    for row, window in enumerate(windows):
        end = len(window.inputs)
        own = logits[row, end - len(window.targets) : end].float()  # [targets, V]
        targets = torch.tensor(window.targets, device=device)
        loss = nn.functional.cross_entropy(own, targets, reduction="none").double().sum()
        yield bool((own.argmax(-1) == targets).all()), float(loss)


def evaluate_last_words(
    model_path: str | Path,
    path: str | Path,
    *,
    batch_size: int = 32,
    device: str | None = None,
    trust_remote_code: bool = False,
    first: int | None = None,
) -> LastWords:
    """`score_words` of a model folder or hub id on the `first` passages of a file, in fp32."""
    model, tokenizer = load_fast(model_path, "float32", device, trust_remote_code)
    return score_words(model, tokenizer, islice(read_passages(path), first), batch_size=batch_size)


def text_table(names: Sequence[str], results: Sequence[LastWords]) -> str:
    """A line a model, then each against the first."""
    width = max(map(len, names))
    lines = [
        f"{name:{width}}  {result.accuracy.share:7.2%} right ({result.accuracy.low:.2%} to "
        f"{result.accuracy.high:.2%})  {result.nats_per_word:.4f} nats/word  {len(result.nll):,} words"
        for name, result in zip(names, results, strict=True)
    ]
    first = results[0]
    for name, result in zip(names[1:], results[1:], strict=True):
        shares = paired_shares(result.answers, first.answers)
        lines.append(
            f"{name} - {names[0]}: {100 * shares.difference:+.2f} points (p = {shares.p_value:.2g}, McNemar)"
        )
        if len(first.nll) > 1:
            nats = paired_difference(result.nll, first.nll)
            lines[-1] += (
                f", {nats.mean:+.4f} nats/word, 95% interval [{nats.low:+.4f}, {nats.high:+.4f}] over words"
            )
    return "\n".join(lines)
