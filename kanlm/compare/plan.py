"""From a comparison's file to work: the arms' solved widths, and the trials with their resolved runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kanlm.compare.schema import (
    MATCHINGS,
    ArmConfig,
    CompareConfig,
    Matching,
    PlannedArm,
    SizeConfig,
    Trial,
    merged,
    run_config,
)
from kanlm.config import RunConfig, UserError
from kanlm.model import KanLMConfig
from kanlm.model.ffn import find_arm
from kanlm.sizing import architecture, matched_width, parameter_counts, training_flops_per_token

Rates = dict[str, float]
"""`learning_rate` and, where the sweep chose one, `kan_learning_rate`: keys of `[train]`."""


def planned_arms(config: CompareConfig, vocab_size: int) -> list[PlannedArm]:
    """Every arm's solved width, in the order matching, size, arm; `UserError` where no width fits."""
    planned = []
    for matching in config.matching:
        for size in config.sizes:
            planned += _matched(config, matching, size, vocab_size)
    return planned


def _matched(
    config: CompareConfig, matching: Matching, size: SizeConfig, vocab_size: int
) -> list[PlannedArm]:
    block_size = config.runs[size.name].data.block_size
    rule = MATCHINGS[matching]

    def amount(model: KanLMConfig) -> float:
        if rule.width == "flops":
            return training_flops_per_token(model, block_size)
        return parameter_counts(model).non_embedding

    def built(arm: ArmConfig) -> tuple[RunConfig, KanLMConfig]:
        model = {"ffn_type": arm.ffn_type, **arm.model}
        run = run_config(config, size, {"model": model, "train": arm.train}, f"arm {arm.name}")
        if arm.name != config.reference:  # a width that every arm can have stands in until it is solved
            model["intermediate_size"] = run.model.get("kan_num_groups", KanLMConfig().kan_num_groups)
            run = run_config(config, size, {"model": model, "train": arm.train}, f"arm {arm.name}")
        return run, architecture(run, vocab_size)

    _, reference = built(config.arm(config.reference))
    target = amount(reference)
    planned = []
    for arm in config.arms:
        run, model = built(arm)
        if arm.name != config.reference:
            model, _ = matched_width(model, arm.ffn_type, target, rule.width, block_size)
        counts = parameter_counts(model)
        mismatch = amount(model) / target - 1
        if abs(mismatch) > rule.tolerance:
            raise UserError(
                f"arm {arm.name}: nearest width {model.intermediate_size} misses the reference's "
                f"{rule.width} by {mismatch:+.2%}, allowed {rule.tolerance:.1%}; make the arm with the "
                "coarsest widths the reference"
            )
        block = find_arm(arm.ffn_type)
        planned.append(
            PlannedArm(
                matching=matching,
                size=size.name,
                arm=arm.name,
                family=block.family,
                ffn_type=arm.ffn_type,
                intermediate_size=model.intermediate_size,
                model={**run.model, "intermediate_size": model.intermediate_size},
                train=arm.train,
                parameters=counts.total,
                embedding_parameters=counts.embedding,
                non_embedding_parameters=counts.non_embedding,
                ffn_parameters=counts.ffn,
                coefficients=block.count_coefficients(model),
                flops_per_token=float(training_flops_per_token(model, block_size)),
                mismatch=mismatch,
            )
        )
    return planned


def swept_arms(config: CompareConfig, arms: Sequence[PlannedArm]) -> list[PlannedArm]:
    """The arms whose rates are tried: those of the first matching, at every size."""
    return [arm for arm in arms if arm.matching == config.matching[0]]


def known_trials(config: CompareConfig, arms: Sequence[PlannedArm]) -> list[Trial]:
    """The trials that follow from the file alone: the sweep's first, or, without a sweep, those reported with
    a budget of tokens.
    """
    if any(config.learning_rates(arm) for arm in config.arms):
        return [
            sweep_trial(config, arm, {"learning_rate": rate})
            for arm in swept_arms(config, arms)
            for rate in config.learning_rates(config.arm(arm.arm))
        ]
    within_tokens = [name for name in config.matching if MATCHINGS[name].budget == "tokens"]
    return final_trials(config.model_copy(update={"matching": tuple(within_tokens)}), arms, {})


def planned_trial(
    config: CompareConfig,
    arm: PlannedArm,
    kind: Literal["sweep", "final"],
    name: str,
    seed: int,
    rates: Mapping[str, float],
    max_tokens: int,
) -> Trial:
    """A trial of `arm` with its run; seed and data order are the same for all arms of one seed."""
    train = {**rates, "max_tokens": max_tokens}
    run = arm_run(config, arm, name=name, seed=seed, data_seed=seed, train=train)
    return Trial(kind=kind, matching=arm.matching, size=arm.size, arm=arm.arm, run=run)


def arm_run(config: CompareConfig, arm: PlannedArm, **changes: Any) -> RunConfig:
    """The run of `arm` at its size, with `changes` on top."""
    size = next(size for size in config.sizes if size.name == arm.size)
    own = merged({"model": arm.model, "train": arm.train}, changes)
    return run_config(config, size, own, f"trial {changes.get('name', arm.arm)}")


def sweep_trial(config: CompareConfig, arm: PlannedArm, rates: Rates) -> Trial:
    """One trial of the sweep."""
    tokens = config.runs[arm.size].train.max_tokens
    name = f"sweep-{arm.size}-{arm.arm}-lr{rates['learning_rate']:g}"
    if "kan_learning_rate" in rates:
        name += f"-kan{rates['kan_learning_rate']:g}"
    tokens = min(config.sweep.max_tokens or tokens, tokens)
    return planned_trial(config, arm, "sweep", name, config.sweep.seed, rates, tokens)


def final_trials(
    config: CompareConfig,
    arms: Sequence[PlannedArm],
    rates: Mapping[tuple[str, str], Rates],
    tokens_per_second: Mapping[tuple[str, str, str], float] | None = None,
) -> list[Trial]:
    """The trials that are reported, seed by seed with the arms' order rotated, so that a machine that slows
    down hits no arm more than another.

    Args:
        arms: as `planned_arms` gives them.
        rates: by (size, arm): the sweep's choice; nothing for what is configured.
        tokens_per_second: by (rule of widths, size, arm): measured step times; needed where the budget is
            time, which then are the tokens that take as long as the reference takes for its own.
    """
    by_key = {(arm.matching, arm.size, arm.arm): arm for arm in arms}
    names = [arm.name for arm in config.arms]
    found: dict[str, Trial] = {}
    trials = []
    for matching in config.matching:
        rule = MATCHINGS[matching]
        for size in config.sizes:
            for turn, seed in enumerate(config.seeds):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    tokens = config.runs[size.name].train.max_tokens
                    if rule.budget == "time":
                        assert tokens_per_second is not None
                        own, reference = (
                            tokens_per_second[rule.width, size.name, one] for one in (name, config.reference)
                        )
                        tokens = round(tokens * own / reference)
                    trial = planned_trial(
                        config,
                        by_key[matching, size.name, name],
                        "final",
                        f"{matching}-{size.name}-{name}-seed{seed}",
                        seed,
                        rates.get((size.name, name), {}),
                        tokens,
                    )
                    same = found.setdefault(trial.run.model_dump_json(exclude={"name"}), trial)
                    trials.append(trial.model_copy(update={"run": same.run}))
    return trials
