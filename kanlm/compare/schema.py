"""What a comparison is: its TOML file, the arms' solved widths, and the trials to run.

    name, output_dir     the folder output_dir/name holds everything
    base                 the run that all arms share: path of a run's TOML, or its tables ([base.model], ...)
    reference            the arm whose width is given; every other arm's width is solved to its size
    matching             "parameters", "flops", "wallclock": one table each, never folded into one score
    seeds                paired: every arm sees the same data order for one seed
    [[arms]]             name, ffn_type, [arms.model] hidden_norm and kan_*, [arms.train] optimiser keys
    [[sizes]]            optional: the same comparison at several sizes (for the parameters claim)
    jobs                 runs that are trained at once
    [sweep]              rates tried for every arm, the same number for each
    [evaluation], [speed]

A matching has two sides, what widths are solved to and what a run may spend, and everything reads those sides
in MATCHINGS: "wallclock" is the widths of "parameters" with a budget of time.

Only the feed-forward block may differ between arms, so an arm that changes another part is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kanlm.compare.judgement import Family
from kanlm.config import (
    MATCHING_TOLERANCE,
    RunConfig,
    Section,
    SourceConfig,
    UserError,
    config_file,
    parse_table,
    toml_table,
    with_overrides,
)

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ARM_TRAIN_KEYS = (
    "learning_rate",
    "kan_lr_multiplier",
    "kan_learning_rate",
    "kan_betas",
    "kan_optimizer",
    "kernels",
)
Matching = Literal["parameters", "flops", "wallclock"]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class MatchingRule:
    """What is made equal: the rule of widths and the rule of budgets."""

    width: Literal["parameters", "flops"]
    """Solved to the reference's: non-embedding parameters, or training FLOPs of a token."""
    budget: Literal["tokens", "time"]
    """The same tokens, or the tokens that take the reference's time by measured step times."""

    @property
    def tolerance(self) -> float:
        """Largest relative mismatch of widths."""
        return MATCHING_TOLERANCE[self.width]


MATCHINGS: dict[Matching, MatchingRule] = {
    "parameters": MatchingRule("parameters", "tokens"),
    "flops": MatchingRule("flops", "tokens"),
    "wallclock": MatchingRule("parameters", "time"),
}


class ArmConfig(Section):
    """One feed-forward block under comparison."""

    name: str = Field(pattern=NAME)
    ffn_type: str
    model: dict[str, Any] = {}
    """`hidden_norm` and `kan_*` of `KanLMConfig`; the reference arm may also give `intermediate_size`."""
    train: dict[str, Any] = {}
    """Of `TrainConfig`: the keys in ARM_TRAIN_KEYS."""
    learning_rates: tuple[Rate, ...] = Field((), strict=False)
    """Sweep of this arm instead of `sweep.learning_rates`, with the same number of trials."""
    kan_learning_rates: tuple[Rate, ...] = Field((), strict=False)
    """Sweep of this arm instead of `sweep.kan_learning_rates`."""

    @model_validator(mode="after")
    def only_the_ffn_differs(self) -> ArmConfig:
        for key in self.model:
            if not key.startswith("kan_") and key not in ("intermediate_size", "hidden_norm"):
                raise ValueError(
                    f"model.{key} of arm {self.name!r} is not the feed-forward block's; arms may differ in "
                    "hidden_norm and kan_* only, so set it in [base.model] for all"
                )
        for key in self.train:
            if key not in ARM_TRAIN_KEYS:
                raise ValueError(
                    f"train.{key} of arm {self.name!r} must be the same for all arms; set it in [base.train] "
                    f"(an arm may set {', '.join(ARM_TRAIN_KEYS)})"
                )
        return self


class SizeConfig(Section):
    """The comparison repeated with other `[base]` values."""

    name: str = Field("base", pattern=NAME)
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}


class SweepConfig(Section):
    """Trials of every arm before the seeds are run, the same number for each; none without `learning_rates`.

    Learning rates come first, then, at the best of them, the rates of KAN coefficients. While the best value
    of an axis is its smallest or largest, the axis grows. Arms that need fewer trials try more learning rates
    beside their best one, until all have the same number.
    """

    learning_rates: tuple[Rate, ...] = Field((), strict=False)
    kan_learning_rates: tuple[Rate, ...] = Field((), strict=False)
    """Absolute rates (`train.kan_learning_rate`), tried by the arms that have KAN coefficients."""
    extend: int = Field(3, ge=0)
    """Values by which an axis may grow."""
    max_tokens: int | None = Field(None, ge=1)
    """Training tokens of a trial; default: the full budget."""
    seed: int = Field(1000, ge=0)
    """Seed of the trials, apart from those reported."""


class EvaluationConfig(Section):
    """How the exported folders are judged."""

    source: SourceConfig | None = None
    """Test text; without it the run's held-out validation text is reported."""
    context_length: int | None = Field(None, ge=2)
    """Default: the block size."""
    stride: int | None = Field(None, ge=1)
    """Default: the context length; a smaller stride gives every token more context and takes longer."""
    batch_size: int = Field(16, ge=1)
    max_documents: int | None = Field(None, ge=1)
    baselines: bool = True
    """Also judge the best Kneser-Ney n-gram model and xz -9 on the same text."""
    equivalence_margin_nats: float = Field(0.01, gt=0)
    """Differences smaller than this count as a tie, nats/token."""
    prompts: tuple[str, ...] = Field((), strict=False)
    """Beginnings of the samples; default: those of two held-out documents."""
    sample_tokens: int = Field(80, ge=0)
    temperature: float = Field(0.8, ge=0)
    top_k: int = Field(40, ge=0)
    functions_per_module: int = Field(3, ge=0)
    """Learned functions drawn for each KAN layer."""
    seed_spread_nats: float = Field(0.01, gt=0)
    """Standard deviation of paired differences that `--dry-run` assumes until runs have measured it."""


class SpeedConfig(Section):
    """Training-step time of all arms, measured in turns in one process."""

    rounds: int = Field(9, ge=0)
    """0 leaves the measurement out."""
    warmup: int = Field(2, ge=0)


class CompareConfig(Section):
    """A comparison; the whole of a `kanlm compare` file."""

    name: str = Field(pattern=NAME)
    output_dir: str = "runs"
    base: dict[str, Any]
    reference: str
    matching: tuple[Matching, ...] = Field(("parameters",), strict=False, min_length=1)
    seeds: tuple[int, ...] = Field((0,), strict=False, min_length=1)
    arms: tuple[ArmConfig, ...] = Field(strict=False, min_length=2)
    sizes: tuple[SizeConfig, ...] = Field((SizeConfig(),), strict=False, min_length=1)
    sweep: SweepConfig = SweepConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    speed: SpeedConfig = SpeedConfig()
    jobs: int = Field(1, ge=1)
    """Runs that are trained at once, each with its share of the cores."""
    launch: tuple[str, ...] = Field((), strict=False)
    """Arguments of `accelerate launch`, e.g. ["--config_file", "configs/accelerate/8-gpus-ddp.yaml"]."""

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) / self.name

    @cached_property
    def runs(self) -> dict[str, RunConfig]:
        """The run that `[base]` describes, at every size."""
        return {size.name: run_config(self, size, {}, "base") for size in self.sizes}

    @cached_property
    def arm_runs(self) -> dict[tuple[str, str], RunConfig]:
        """The run of every arm by (size, arm); the width is that of `[base]` until it is solved."""
        return {
            (size.name, arm.name): run_config(
                self,
                size,
                {"model": {"ffn_type": arm.ffn_type, **arm.model}, "train": arm.train},
                f"arm {arm.name}",
            )
            for size in self.sizes
            for arm in self.arms
        }

    @property
    def first_run(self) -> RunConfig:
        """At the first size; text, tokenizer and block size are those of all."""
        return self.runs[self.sizes[0].name]

    def arm(self, name: str) -> ArmConfig:
        return next(arm for arm in self.arms if arm.name == name)

    def learning_rates(self, arm: ArmConfig) -> tuple[float, ...]:
        return arm.learning_rates or self.sweep.learning_rates

    def kan_learning_rates(self, arm: ArmConfig) -> tuple[float, ...]:
        return arm.kan_learning_rates or self.sweep.kan_learning_rates

    @field_validator("matching", "seeds", "sizes", "arms")
    @classmethod
    def no_repeats(cls, value: tuple) -> tuple:
        names = [getattr(item, "name", item) for item in value]
        repeated = sorted({str(name) for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} given twice; each must be there once")
        return value

    @model_validator(mode="after")
    def consistent(self) -> CompareConfig:
        if self.base.get("init_from"):
            raise ValueError("base.init_from: arms differ in what a given model has fixed; leave it out")
        names = [arm.name for arm in self.arms]
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is not an arm; the arms are {', '.join(names)}")
        for arm in self.arms:
            if "intermediate_size" in arm.model and arm.name != self.reference:
                raise ValueError(
                    f"arm {arm.name!r} gives intermediate_size, but only the reference's ({self.reference}) "
                    "is given; the others are solved"
                )
        trials = {arm.name: len(self.learning_rates(arm)) for arm in self.arms}
        if len(set(trials.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in trials.items())
            raise ValueError(f"every arm gets the same number of learning-rate trials, got {listed}")
        for arm in self.arms:
            if self.kan_learning_rates(arm) and not self.learning_rates(arm):
                raise ValueError(
                    f"arm {arm.name!r} has kan_learning_rates but no learning_rates, which come first; give "
                    "sweep.learning_rates"
                )
        rules = {matching: MATCHINGS[matching] for matching in self.matching}
        for matching, rule in rules.items():
            if rule.budget == "tokens":
                continue
            if not any(other.width == rule.width and other.budget == "tokens" for other in rules.values()):
                raise ValueError(f'matching "{matching}" trains the widths of another; add "{rule.width}"')
            if not self.speed.rounds:
                raise ValueError(
                    f'matching "{matching}" needs measured step times; set speed.rounds to 5 or more'
                )
        return self


Key = tuple[Matching, str, str]
"""Matching, size and arm."""


class PlannedArm(Section):
    """One arm at one matching and size: the width that was solved and what it costs."""

    matching: Matching
    size: str
    arm: str
    family: Family
    ffn_type: str
    intermediate_size: int
    model: dict[str, Any]
    train: dict[str, Any]
    parameters: int
    embedding_parameters: int
    non_embedding_parameters: int
    ffn_parameters: int
    coefficients: int
    """Of its KAN functions; they may have a rate of their own."""
    flops_per_token: float
    """Training FLOPs: forward and backward."""
    mismatch: float
    """Relative difference of what is matched from the reference arm's; positive = larger."""

    @property
    def key(self) -> Key:
        return self.matching, self.size, self.arm

    @property
    def line(self) -> str:
        """What is said of it before anything is trained."""
        return (
            f"  {self.arm}: {self.ffn_type}, width {self.intermediate_size}, "
            f"{self.non_embedding_parameters:,} parameters without embeddings ({self.mismatch:+.2%}), "
            f"equal {self.matching}, size {self.size}"
        )


class Trial(Section):
    """One training run of the comparison, with its resolved configuration.

    Two trials that train the same (the reference with a budget of time) have one run between them.
    """

    kind: Literal["sweep", "final"]
    matching: Matching
    size: str
    arm: str
    run: RunConfig

    @property
    def key(self) -> Key:
        return self.matching, self.size, self.arm

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def learning_rate(self) -> float:
        return self.run.train.learning_rate

    @property
    def max_tokens(self) -> int:
        return self.run.train.max_tokens


def load_compare_config(path: str | Path, overrides: Iterable[str] = ()) -> CompareConfig:
    """The comparison in the TOML file at `path`; a `base` path is read relative to that file."""
    table = toml_table(path)
    if "arms" not in table and "train" in table:
        raise UserError(
            f"{path}: the file of one run, not of a comparison; `kanlm train {path}` trains it, `kanlm plan "
            f"{path}` shows its sizes"
        )
    overrides = list(overrides)
    if isinstance(table.get("base"), str):
        table["base"] = toml_table(config_file(path).parent / table["base"])
    config = parse_table(CompareConfig, with_overrides(table, overrides), str(path), overrides)
    try:
        _ = config.runs, config.arm_runs
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def run_config(config: CompareConfig, size: SizeConfig, changes: dict[str, Any], where: str) -> RunConfig:
    """The run of `size` with `changes` on top of `[base]`; its folder lies in the comparison's `arms/`.

    Tables are merged one level deep: `model` and `train` key by key.
    """
    fixed = {"name": "base", "output_dir": str(config.directory / "arms")}
    table: dict[str, Any] = {"tracking": {"group": config.name}}
    layers: tuple[dict[str, Any], ...] = (
        config.base,
        {"model": size.model, "train": size.train},
        fixed,
        changes,
    )
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(table.get(key), dict)
            table[key] = {**table[key], **value} if both else value
    return parse_table(RunConfig, table, where)
