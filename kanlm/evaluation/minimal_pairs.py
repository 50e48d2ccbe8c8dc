"""Zero-shot minimal pairs: is the grammatical sentence more likely than its ungrammatical twin?

The score of BLiMP (Warstadt et al. 2020): the share of pairs with ln p(good) > ln p(bad) in each paradigm,
then the mean over paradigms; chance is 50%. Sentences are scored whole, after the prefix token, without
length correction. A phenomenon is a group of paradigms; its share is over all its pairs.

Two models answer the same pairs: McNemar's exact test for each phenomenon, Holm-adjusted, and a paired t
interval of the score over paradigms.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from kanlm.config import UserError
from kanlm.evaluation.answers import PairedShares, Share, paired_shares, share_of
from kanlm.evaluation.perplexity import (
    Window,
    load_fast,
    max_context_length,
    prefix_token,
    token_ids,
    window_nll,
)
from kanlm.stats import holm, paired_difference


@dataclass(frozen=True)
class Pair:
    paradigm: str
    good: str
    bad: str
    phenomenon: str = ""


@dataclass(frozen=True)
class MinimalPairs:
    """What one model answered: `answers` by paradigm in the order of the file, True where it is right."""

    answers: dict[str, list[bool]]
    phenomenon_of: dict[str, str]

    @property
    def pairs(self) -> int:
        return sum(map(len, self.answers.values()))

    @property
    def paradigms(self) -> dict[str, float]:
        return {name: sum(own) / len(own) for name, own in self.answers.items()}

    @property
    def accuracy(self) -> float:
        """The mean over paradigms of their shares."""
        shares = self.paradigms.values()
        return sum(shares) / len(shares)

    @property
    def by_phenomenon(self) -> dict[str, list[bool]]:
        found: dict[str, list[bool]] = {}
        for paradigm, own in self.answers.items():
            found.setdefault(self.phenomenon_of[paradigm], []).extend(own)
        return dict(sorted(found.items()))

    @property
    def phenomena(self) -> dict[str, Share]:
        return {name: share_of(own) for name, own in self.by_phenomenon.items()}

    def as_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "pairs": self.pairs,
            "phenomena": {name: asdict(share) for name, share in self.phenomena.items()},
            "paradigms": self.paradigms,
        }


@dataclass(frozen=True)
class PairsDifference:
    """A model less a baseline: the score with a 95% interval over paradigms, and each phenomenon."""

    accuracy: float
    low: float
    high: float
    p_value: float
    """1 where there is one paradigm alone, whose interval is a point."""
    phenomena: dict[str, PairedShares]
    p_holm: dict[str, float]


def read_pairs(path: str | Path, each: int | None = None) -> Iterator[Pair]:
    """Pairs of a .jsonl file (also .xz, .gz): one object a line with `good`, `bad`, the paradigm `uid` and
    the phenomenon `term`; of every paradigm the first `each`.

    BLiMP's own names `sentence_good`, `sentence_bad`, `UID` and `linguistics_term` are read as well.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of minimal pairs")
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    seen: dict[str, int] = {}
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
            paradigm = str(row.get("uid") or row.get("UID") or "all")
            seen[paradigm] = seen.get(paradigm, 0) + 1
            if each is None or seen[paradigm] <= each:
                yield Pair(paradigm, good, bad, row.get("term") or row.get("linguistics_term") or "")


def score_pairs(
    model: nn.Module, tokenizer: Any, pairs: Iterable[Pair], *, batch_size: int = 64
) -> MinimalPairs:
    """Judge `pairs` with a loaded model; `batch_size` counts sentences. A tie is not a win."""
    if batch_size < 2:
        raise UserError(f"batch_size: expected at least 2 sentences, got {batch_size}")
    prefix, longest = prefix_token(model, tokenizer), max_context_length(model)
    model.eval()
    answers: dict[str, list[bool]] = {}
    phenomenon_of: dict[str, str] = {}
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
            for window, value in zip(batch, window_nll(model, batch).tolist(), strict=True):
                nll[window.document] = value
        for index, pair in enumerate(buffer):
            answers.setdefault(pair.paradigm, []).append(nll[2 * index] < nll[2 * index + 1])
            phenomenon_of.setdefault(pair.paradigm, pair.phenomenon or pair.paradigm)
    if not answers:
        raise UserError("pairs: there is none; expected at least one line")
    return MinimalPairs(dict(sorted(answers.items())), phenomenon_of)


def _sentence(index: int, tokens: list[int], prefix: int, longest: int, text: str) -> Window:
    if not 1 <= len(tokens) <= longest:
        raise UserError(f"pairs: a sentence has {len(tokens)} tokens, expected 1 to {longest}: {text[:60]!r}")
    return Window(index, [prefix, *tokens[:-1]], tokens)


def difference(model: MinimalPairs, baseline: MinimalPairs) -> PairsDifference:
    """Both on the same pairs, in the same order."""
    ours, theirs = list(model.paradigms.values()), list(baseline.paradigms.values())
    phenomena = {
        name: paired_shares(own, baseline.by_phenomenon[name]) for name, own in model.by_phenomenon.items()
    }
    adjusted = holm([found.p_value for found in phenomena.values()])
    mean = model.accuracy - baseline.accuracy
    low, high, p_value = mean, mean, 1.0
    if len(ours) > 1:
        paired = paired_difference(ours, theirs)
        low, high, p_value = paired.low, paired.high, paired.p_value
    return PairsDifference(mean, low, high, p_value, phenomena, dict(zip(phenomena, adjusted, strict=True)))


def evaluate_minimal_pairs(
    model_path: str | Path,
    path: str | Path,
    *,
    batch_size: int = 64,
    device: str | None = None,
    trust_remote_code: bool = False,
    each: int | None = None,
) -> MinimalPairs:
    """`score_pairs` of a model folder or hub id on a file, in fp32; of a paradigm the first `each`."""
    model, tokenizer = load_fast(model_path, "float32", device, trust_remote_code)
    return score_pairs(model, tokenizer, read_pairs(path, each), batch_size=batch_size)


def text_table(names: Sequence[str], results: Sequence[MinimalPairs]) -> str:
    """A line a phenomenon: each model's share with its interval, and each against the first."""
    first = results[0]
    lines = [f"{'':42}" + "".join(f"  {_short(name):>24}" for name in names)]
    shown = [[*result.phenomena.values()] for result in results]
    for row, phenomenon in enumerate(first.phenomena):
        cells = [f"  {own[row].share:7.1%} ({own[row].low:.1%} to {own[row].high:.1%})" for own in shown]
        lines.append(f"{phenomenon:42}" + "".join(f"{cell:>26}" for cell in cells))
    lines.append(f"{'mean over paradigms':42}" + "".join(f"  {result.accuracy:24.2%}" for result in results))
    for name, result in zip(names[1:], results[1:], strict=True):
        found = difference(result, first)
        lines.append(
            f"{name} - {names[0]}: {100 * found.accuracy:+.2f} points, 95% interval "
            f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}] over {len(first.paradigms)} paradigms, "
            f"p = {found.p_value:.2g}"
        )
        lines += [
            f"  {phenomenon}: {100 * one.difference:+.1f} points, {one.only_model} pairs right alone against "
            f"{one.only_baseline}, p = {found.p_holm[phenomenon]:.2g} (McNemar, Holm over phenomena)"
            for phenomenon, one in found.phenomena.items()
            if found.p_holm[phenomenon] <= 0.05
        ]
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"...{name[-21:]}"
