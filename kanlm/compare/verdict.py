"""From a comparison's artifacts to its judgements; the rules are those of `kanlm.compare.judgement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kanlm.compare.artifacts import Artifacts, Result
from kanlm.compare.judgement import ArmLosses, Judgement, best_baseline, judge, mean
from kanlm.compare.schema import MATCHINGS, MatchingRule
from kanlm.runs import EvalReport
from kanlm.stats import standard_error


def finished(results: Sequence[Result]) -> dict[int, EvalReport]:
    """Evaluations by seed."""
    return {result.trial.seed: result.eval for result in results if result.eval is not None}


def mean_bits(results: Sequence[Result]) -> float | None:
    values = [result.eval.bits_per_byte for result in results if result.eval is not None]
    return mean(values) if values else None


def learned_nothing(bits_per_byte: float, baselines: Sequence[dict[str, Any]]) -> bool:
    """Whether a model is beaten by everything that needs no neural network, also by the weakest n-gram order.

    A model that beats the weak orders and not the best has learned something: it is judged, and the sentence
    says that counting predicts better.
    """
    known = [bits for row in baselines for bits in (row["bits_per_byte"], *row.get("orders", {}).values())]
    return bool(known) and bits_per_byte >= max(known)


def arm_losses(results: Sequence[Result]) -> list[ArmLosses]:
    """What every arm reached, from all results at one matching and size; arms in the order of the results."""
    by_arm: dict[str, list[Result]] = {}
    for result in results:
        by_arm.setdefault(result.trial.arm, []).append(result)
    return [_losses(name, own) for name, own in by_arm.items()]


def _losses(name: str, results: Sequence[Result]) -> ArmLosses:
    """Validation: the training loop's loss of the last step over all of the held-out text."""
    reports = finished(results)
    validated = {
        result.trial.seed: result.record.final_validation["loss"]
        for result in results
        if result.trial.seed in reports and result.record and result.record.final_validation
    }
    return ArmLosses(
        name=name,
        family=results[0].arm.family,
        validation=validated,
        test={seed: report.loss for seed, report in reports.items()},
        diverged=frozenset(result.trial.seed for result in results if result.state == "diverged"),
        bits_per_byte={seed: report.bits_per_byte for seed, report in reports.items()},
    )


def best_mlp(results: Sequence[Result]) -> str | None:
    """The MLP arm with the lowest loss on the validation text."""
    return best_baseline(arm_losses(results))


def judgements(artifacts: Artifacts, matching: str, size: str) -> list[Judgement]:
    """One for each KAN and control arm, KANs first, the best on the test text first."""
    results = artifacts.at(matching, size)
    losses = arm_losses(results)
    idle = {
        arm.name
        for arm in losses
        if arm.bits_per_byte and learned_nothing(mean([*arm.bits_per_byte.values()]), artifacts.baselines)
    }
    margin = artifacts.config.evaluation.equivalence_margin_nats
    judged = judge(
        losses,
        margin,
        matching=matching,
        size=size,
        learned_nothing=idle,
        broken_rule=broken_rule(results, MATCHINGS[results[0].trial.matching]) if results else "",
    )
    return [replace(one, text_error_nats=text_error(results, one)) for one in judged]


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


def text_error(results: Sequence[Result], judgement: Judgement) -> float | None:
    """Sampling error of the difference that another test text of this kind and length would show.

    From the difference of the two arms in up to 100 consecutive parts of the text, averaged over the seeds
    that both finished; None where evaluations keep no parts.
    """
    own, other = (
        finished([result for result in results if result.trial.arm == name])
        for name in (judgement.arm, judgement.baseline)
    )
    seeds = sorted(set(own) & set(other))
    kept = [report.parts for seed in seeds for report in (own[seed], other[seed])]
    if not kept or len({len(parts) for parts in kept}) > 1 or len(kept[0]) < 2:
        return None
    tokens = [tokens for tokens, _ in kept[0]]
    nll = np.array([[nll for _, nll in parts] for parts in kept])  # [2 seeds, parts]
    return standard_error((nll[::2] - nll[1::2]).mean(axis=0).tolist(), tokens)


def tokens_to_loss(result: Result, target: float) -> float | None:
    """Training tokens after which the validation loss first reached `target`, interpolated; None if never."""
    curve = result.curve
    points = list(zip(curve.validation_tokens, curve.validation_loss, strict=True))
    for (earlier, before), (later, after) in zip(points, points[1:], strict=False):
        if before <= target:
            return earlier
        if after <= target:
            return float(np.interp(target, [after, before], [later, earlier]))
    return points[0][0] if len(points) == 1 and points[0][1] <= target else None
