"""From a comparison's artifacts to its verdicts; the rules are those of `kanlm.compare.judgement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kanlm.compare.artifacts import ArmRuns, Artifacts, Result, Table
from kanlm.compare.judgement import ArmLosses, Judgement, judge, sentence
from kanlm.compare.schema import MATCHINGS, MatchingRule
from kanlm.stats import standard_error


@dataclass(frozen=True)
class Verdict:
    """A judgement, and how the report says it."""

    judgement: Judgement
    sentence: str


def verdicts(artifacts: Artifacts) -> list[Verdict]:
    """One for each KAN and control arm at every matching and size; KANs first, then the best."""
    margin = artifacts.config.evaluation.equivalence_margin_nats
    judged = [one for table in artifacts.tables for one in judgements(table, margin)]
    return [Verdict(one, sentence(one, margin) + counting_beats_both(artifacts, one)) for one in judged]


def judgements(table: Table, margin: float) -> list[Judgement]:
    judged = judge(
        [arm_losses(runs) for runs in table.arms.values() if runs.results],
        margin,
        matching=table.matching,
        size=table.size,
        learned_nothing={name for name, runs in table.arms.items() if runs.learned_nothing},
        broken_rule=broken_rule(table.results, MATCHINGS[table.matching]),
    )
    return [replace(one, text_error_nats=text_error(table, one)) for one in judged]


def arm_losses(runs: ArmRuns) -> ArmLosses:
    """What one arm reached. Validation: the training loop's loss of the last step, over all held-out text."""
    return ArmLosses(
        name=runs.planned.arm,
        family=runs.planned.family,
        validation={
            result.trial.seed: result.record.final_validation["loss"]
            for result in runs.results
            if result.eval and result.record and result.record.final_validation
        },
        test={seed: report.loss for seed, report in runs.evaluations.items()},
        diverged=frozenset(result.trial.seed for result in runs.results if result.state == "diverged"),
        bits_per_byte={seed: report.bits_per_byte for seed, report in runs.evaluations.items()},
    )


def broken_rule(results: Sequence[Result], rule: MatchingRule) -> str:
    """The first rule of the protocol that finished runs of one matching and size break; empty where none."""
    done = [result for result in results if result.eval is not None and result.record is not None]
    rules: dict[str, Callable[[Any], Any]] = {
        "equal data": lambda result: result.trial.run.data.model_dump_json(),
        "equal tokenizer": lambda result: result.trial.run.tokenizer.model_dump_json(),
        "one test text": lambda result: (result.eval.data_sha256, result.eval.bytes),
        "one tokenizer of the test text": lambda result: result.eval.tokens,
        "equal context and stride": lambda result: (result.eval.context_length, result.eval.stride),
    }
    if rule.budget == "tokens":
        rules["equal training tokens"] = lambda result: result.record.tokens
    for name, value in rules.items():
        if len({value(result) for result in done}) > 1:
            arms = {value(result): result.trial.arm for result in done}
            return f"the rule of {name} is broken ({' and '.join(arms.values())} differ)"
    unmatched = [result.trial.arm for result in done if abs(result.arm.mismatch) > rule.tolerance]
    if unmatched:
        return f"the rule of equal {rule.width} is broken ({unmatched[0]} is not within {rule.tolerance:.1%})"
    return ""


def text_error(table: Table, judgement: Judgement) -> float | None:
    """Sampling error of the difference that another test text of this kind and length would show.

    From the difference of the two arms in up to 100 consecutive parts of the text, averaged over the seeds
    that both finished; None where evaluations keep no parts.
    """
    if judgement.baseline is None:
        return None
    own, other = (table.arms[name].evaluations for name in (judgement.arm, judgement.baseline))
    pairs = [(own[seed].parts, other[seed].parts) for seed in sorted(set(own) & set(other))]
    parts = [one for pair in pairs for one in pair]
    if not parts or len({len(one) for one in parts}) > 1 or len(parts[0]) < 2:
        return None
    tokens = [tokens for tokens, _ in parts[0]]
    nll = np.array([[nll for _, nll in one] for one in parts])  # [2 seeds, parts]
    return standard_error((nll[::2] - nll[1::2]).mean(axis=0).tolist(), tokens)


def counting_beats_both(artifacts: Artifacts, judgement: Judgement) -> str:
    """What the verdict has to add where a model that only counts or compresses predicts better than both."""
    bits = [judgement.arm_bits_per_byte, judgement.baseline_bits_per_byte]
    known = [value for value in bits if value is not None]
    rows = [row for row in artifacts.baselines if known and row["bits_per_byte"] <= min(known)]
    if not rows or judgement.outcome in ("no result", "learned nothing"):
        return ""
    listed = " and ".join(f"{row['name']} ({row['bits_per_byte']:.4f})" for row in rows)
    verb = "predict" if len(rows) > 1 else "predicts"
    return f" Without any neural network {listed} {verb} this text better than both."
