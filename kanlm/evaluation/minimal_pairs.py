"""Zero-shot minimal pairs: is the grammatical sentence more likely than its ungrammatical twin?

The score of BLiMP (Warstadt et al. 2020): the share of pairs with ln p(good) > ln p(bad) in each paradigm,
then the mean over paradigms; chance is 50%. Sentences are scored whole, after the prefix token, without
length correction.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from kanlm import kernels
from kanlm.config import UserError
from kanlm.evaluation.loading import load_causal_lm
from kanlm.evaluation.perplexity import Window, max_context_length, prefix_token, token_ids
from kanlm.evaluation.perplexity import window_nll as _window_nll


@dataclass(frozen=True)
class Pair:
    paradigm: str
    good: str
    bad: str


@dataclass(frozen=True)
class MinimalPairs:
    """`accuracy` is the mean over `paradigms` of their shares; `pairs` counts all."""

    accuracy: float
    paradigms: dict[str, float]
    pairs: int


def read_pairs(path: str | Path) -> Iterator[Pair]:
    """Pairs of a .jsonl file (also .xz, .gz): one object a line with `good`, `bad` and the paradigm `uid`.

    BLiMP's own names `sentence_good`, `sentence_bad` and `UID` are read as well.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of minimal pairs")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                good = row.get("good") or row["sentence_good"]
                bad = row.get("bad") or row["sentence_bad"]
            except (json.JSONDecodeError, KeyError, AttributeError) as error:
                raise UserError(
                    f"{path}:{number}: expected an object with good and bad, e.g. "
                    f'{{"uid": "agreement", "good": "...", "bad": "..."}} ({error})'
                ) from None
            yield Pair(str(row.get("uid") or row.get("UID") or "all"), good, bad)


def score_pairs(
    model: nn.Module, tokenizer: Any, pairs: Iterable[Pair], *, batch_size: int = 64
) -> MinimalPairs:
    """Judge `pairs` with a loaded model; `batch_size` counts sentences. A tie is not a win."""
    if batch_size < 2:
        raise UserError(f"batch_size: expected at least 2 sentences, got {batch_size}")
    prefix, longest = prefix_token(model, tokenizer), max_context_length(model)
    model.eval()
    wins: dict[str, list[bool]] = {}
    remaining = iter(pairs)
    while buffer := list(islice(remaining, 64 * batch_size)):
        windows = [
            _sentence(index, token_ids(tokenizer, text), prefix, longest, text)
            for index, text in enumerate(text for pair in buffer for text in (pair.good, pair.bad))
        ]
        windows.sort(key=lambda window: len(window.inputs))
        nll = [0.0] * len(windows)
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            for window, value in zip(batch, _window_nll(model, batch).tolist(), strict=True):
                nll[window.document] = value
        for index, pair in enumerate(buffer):
            wins.setdefault(pair.paradigm, []).append(nll[2 * index] < nll[2 * index + 1])
    if not wins:
        raise UserError("pairs: there is none; expected at least one line")
    shares = {paradigm: sum(won) / len(won) for paradigm, won in sorted(wins.items())}
    return MinimalPairs(sum(shares.values()) / len(shares), shares, sum(map(len, wins.values())))


def _sentence(index: int, tokens: list[int], prefix: int, longest: int, text: str) -> Window:
    if not 1 <= len(tokens) <= longest:
        raise UserError(f"pairs: a sentence has {len(tokens)} tokens, expected 1 to {longest}: {text[:60]!r}")
    return Window(index, [prefix, *tokens[:-1]], tokens)


def evaluate_minimal_pairs(
    model_path: str | Path,
    path: str | Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> MinimalPairs:
    """`score_pairs` of a model folder or hub id on a file of pairs, in fp32."""
    model, tokenizer = load_causal_lm(model_path, device=device, trust_remote_code=trust_remote_code)
    kernels.select(model)
    return score_pairs(model, tokenizer, read_pairs(path), batch_size=batch_size)
