"""From a comparison's file to work: solved widths, the trials of the sweep and of every seed, their run
files."""

from __future__ import annotations

import json
from typing import Any, Literal

from kanlm.compare.schema import (
    TOLERANCE,
    ArmConfig,
    CompareConfig,
    Matching,
    PlannedArm,
    SizeConfig,
    Trial,
    run_config,
)
from kanlm.config import RunConfig, UserError
from kanlm.model import KanLMConfig
from kanlm.sizing import architecture, matched_width, parameter_counts, training_flops_per_token


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
    block_size = run_config(config, size, {}, config.name).data.block_size
    measured: Literal["parameters", "flops"] = "flops" if matching == "flops" else "parameters"

    def amount(model: KanLMConfig) -> float:
        if measured == "flops":
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
            model, _ = matched_width(model, arm.ffn_type, target, measured, block_size)
        counts = parameter_counts(model)
        mismatch = amount(model) / target - 1
        if abs(mismatch) > TOLERANCE[matching]:
            raise UserError(
                f"arm {arm.name}: nearest width {model.intermediate_size} misses the reference's {measured} "
                f"by {mismatch:+.2%}, allowed {TOLERANCE[matching]:.1%}; make the arm with the coarsest "
                "widths the reference"
            )
        planned.append(
            PlannedArm(
                matching=matching,
                size=size.name,
                arm=arm.name,
                family=arm.family,
                ffn_type=arm.ffn_type,
                intermediate_size=model.intermediate_size,
                model={**run.model, "intermediate_size": model.intermediate_size},
                train=arm.train,
                parameters=counts.total,
                embedding_parameters=counts.embedding,
                non_embedding_parameters=counts.non_embedding,
                ffn_parameters=counts.ffn,
                flops_per_token=float(training_flops_per_token(model, block_size)),
                mismatch=mismatch,
            )
        )
    return planned


def sweep_trials(config: CompareConfig) -> list[Trial]:
    """Learning-rate trials of all arms at the first matching, arms in turns."""
    matching = config.matching[0]
    trials = []
    for size in config.sizes:
        base = run_config(config, size, {}, config.name)
        tokens = min(config.sweep.max_tokens or base.train.max_tokens, base.train.max_tokens)
        for index in range(len(config.learning_rates(config.arms[0]))):
            for arm in config.arms:
                rate = sorted(config.learning_rates(arm))[index]
                trials.append(
                    Trial(
                        name=f"sweep-{size.name}-{arm.name}-lr{rate:g}",
                        kind="sweep",
                        matching=matching,
                        size=size.name,
                        arm=arm.name,
                        seed=config.sweep.seed,
                        learning_rate=rate,
                        max_tokens=tokens,
                    )
                )
    return trials


def final_trials(
    config: CompareConfig,
    learning_rates: dict[tuple[str, str], float],
    tokens_per_second: dict[tuple[str, str], float] | None = None,
) -> list[Trial]:
    """The trials that are reported, seed by seed with the arms' order rotated, so that a machine that slows
    down hits no arm more than another.

    Args:
        learning_rates: by (size, arm): the sweep's choice, or the configured one.
        tokens_per_second: by (size, arm): step-time measurement; needed for matching "wallclock", where an
            arm's token budget is the reference's times the ratio of their speeds.
    """
    trials = []
    for matching in config.matching:
        for size in config.sizes:
            budget = run_config(config, size, {}, config.name).train.max_tokens
            for turn, seed in enumerate(config.seeds):
                shift = turn % len(config.arms)
                for arm in config.arms[shift:] + config.arms[:shift]:
                    if matching == "wallclock" and arm.name == config.reference:
                        continue
                    tokens = budget
                    if matching == "wallclock":
                        assert tokens_per_second is not None
                        speed = tokens_per_second[size.name, arm.name]
                        tokens = round(budget * speed / tokens_per_second[size.name, config.reference])
                    trials.append(
                        Trial(
                            name=f"{matching}-{size.name}-{arm.name}-seed{seed}",
                            kind="final",
                            matching=matching,
                            size=size.name,
                            arm=arm.name,
                            seed=seed,
                            learning_rate=learning_rates[size.name, arm.name],
                            max_tokens=tokens,
                        )
                    )
    return trials


def trial_config(config: CompareConfig, planned: PlannedArm, trial: Trial) -> RunConfig:
    """The run configuration of `trial`; seed and data order are the same for all arms of one seed."""
    size = next(size for size in config.sizes if size.name == trial.size)
    train = {**planned.train, "learning_rate": trial.learning_rate, "max_tokens": trial.max_tokens}
    changes = {
        "name": trial.name,
        "seed": trial.seed,
        "data_seed": trial.seed,
        "model": planned.model,
        "train": train,
    }
    return run_config(config, size, changes, f"trial {trial.name}")


def toml_text(table: dict[str, Any], prefix: str = "") -> str:
    """`table` as TOML: values first, then tables; None is left out."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {_toml_value(value)}")
    for key, value in tables:
        path = f"{prefix}{key}"
        lines.append(f"\n[{path}]\n{toml_text(value, path + '.')}".rstrip())
    return "\n".join(lines).strip("\n") + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return f"{{{pairs}}}"
    return f"[{', '.join(_toml_value(item) for item in value)}]"
