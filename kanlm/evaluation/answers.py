"""Shares of right answers with their intervals, and two models on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Share:
    """`right` of `asked` answers, with Wilson's 95% interval of the share (Wilson 1927)."""

    right: int
    asked: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedShares:
    """Model less baseline on the same questions; p of McNemar's exact test (McNemar 1947)."""

    difference: float
    only_model: int
    """Questions that the model alone answered right."""
    only_baseline: int
    p_value: float


def share_of(answers: Sequence[bool]) -> Share:
    """Share of right answers; the questions are taken as independent draws. Needs one or more."""
    right, asked = sum(answers), len(answers)
    interval = binomtest(right, asked).proportion_ci(0.95, method="wilson")
    return Share(right, asked, right / asked, float(interval.low), float(interval.high))


def paired_shares(model: Sequence[bool], baseline: Sequence[bool]) -> PairedShares:
    """Answers of two models to the same questions, in the same order."""
    only_model = sum(ours and not theirs for ours, theirs in zip(model, baseline, strict=True))
    only_baseline = sum(theirs and not ours for ours, theirs in zip(model, baseline, strict=True))
    differ = only_model + only_baseline
    p_value = float(binomtest(only_model, differ).pvalue) if differ else 1.0
    return PairedShares((only_model - only_baseline) / len(model), only_model, only_baseline, p_value)
