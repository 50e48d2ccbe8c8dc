"""What the artifacts of a comparison say: a verdict on every arm by the rules of `judgement`, and claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kanlm.compare.artifacts import ArmRuns, Artifacts, Result, Table
from kanlm.compare.claims import claims
from kanlm.compare.judgement import ArmLosses, Judgement, judge, sentence
from kanlm.compare.schema import MATCHINGS, MatchingRule


@dataclass(frozen=True)
class Verdict:
    """A judgement, and how the report says it."""

    judgement: Judgement
    sentence: str


@dataclass(frozen=True)
class Findings:
    """Of all matchings and sizes."""

    verdicts: list[Verdict]
    """One for each KAN and control arm at every matching and size; KANs first, then the best."""
    claims: list[dict[str, Any]]
    notes: list[str]
    """Where the text is too short: its sampling error is to stay below a third of the seeds' spread."""


def findings(artifacts: Artifacts) -> Findings:
    """The verdicts, and the claims against the baseline of the verdicts."""
    margin = artifacts.config.evaluation.equivalence_margin_nats
    judged = [one for table in artifacts.tables for one in judgements(table, margin)]
    verdicts = [Verdict(one, sentence(one, margin, artifacts.baselines)) for one in judged]
    return Findings(verdicts, claims(artifacts, judged), text_notes(judged))


def judgements(table: Table, margin: float) -> list[Judgement]:
    losses = [arm_losses(runs) for runs in table.arms.values() if runs.results]
    broken = broken_rule(table.results, MATCHINGS[table.matching])
    idle = {name for name, runs in table.arms.items() if runs.learned_nothing}
    return judge(
        losses, margin, matching=table.matching, size=table.size, learned_nothing=idle, broken_rule=broken
    )


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
        parts={seed: report.parts for seed, report in runs.evaluations.items()},
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


def text_notes(judged: Sequence[Judgement]) -> list[str]:
    """Where the text is too short: its sampling error is to stay below a third of the seeds' spread."""
    return [
        f"{one.arm}: another test text of this length would move the difference by {one.text_error_nats:.4f} "
        f"nats, more than a third of what seeds do ({one.std_nats:.4f}); a longer text would say more."
        for one in judged
        if one.text_error_nats is not None and one.std_nats and one.text_error_nats > one.std_nats / 3
    ]
