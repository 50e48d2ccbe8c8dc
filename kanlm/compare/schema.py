"""What a comparison is: its TOML file, the arms' solved widths, and the trials to run.

    name, output_dir     the folder output_dir/name holds everything
    base                 the run that all arms share: path of a run's TOML, or its tables ([base.model], ...)
    reference            the arm whose width is given; every other arm's width is solved to its size
    matching             "parameters", "flops", "wallclock": one table each, never folded into one score
    seeds                paired: every arm sees the same data order for one seed
    [[arms]]             name, ffn_type, [arms.model] hidden_norm and kan_*, [arms.train] optimiser keys
    [[sizes]]            optional: the same comparison at several sizes (for the parameters claim)
    [sweep]              learning rates tried for every arm, the same number for each
    [evaluation], [speed]

Only the feed-forward block may differ between arms, so an arm that changes another part is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kanlm.compare.judgement import Family
from kanlm.config import RunConfig, Section, SourceConfig, config_file, parsed, toml_table, with_overrides

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ARM_TRAIN_KEYS = (
    "learning_rate",
    "kan_lr_multiplier",
    "kan_learning_rate",
    "kan_betas",
    "kan_optimizer",
    "kernels",
)
TOLERANCE = {"parameters": 0.005, "flops": 0.01, "wallclock": 0.005}
"""Largest relative mismatch; wall-clock arms have the parameter-matched widths."""

Matching = Literal["parameters", "flops", "wallclock"]


class ArmConfig(Section):
    """One feed-forward block under comparison."""

    name: str = Field(pattern=NAME)
    ffn_type: str
    model: dict[str, Any] = {}
    """`hidden_norm` and `kan_*` of `KanLMConfig`; the reference arm may also give `intermediate_size`."""
    train: dict[str, Any] = {}
    """Of `TrainConfig`: the keys in ARM_TRAIN_KEYS."""
    learning_rates: tuple[float, ...] = Field((), strict=False)
    """Sweep of this arm instead of `sweep.learning_rates`, with the same number of trials."""

    @property
    def family(self) -> Family:
        from kanlm.model.ffn import find_arm  # here, so that a report needs no torch

        return find_arm(self.ffn_type).family

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
    """Learning-rate trials of every arm before the seeds are run; none without `learning_rates`."""

    learning_rates: tuple[float, ...] = Field((), strict=False)
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
    launch: tuple[str, ...] = Field((), strict=False)
    """Arguments of `accelerate launch`, e.g. ["--config_file", "configs/accelerate/8-gpus-ddp.yaml"]."""

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) / self.name

    def arm(self, name: str) -> ArmConfig:
        return next(arm for arm in self.arms if arm.name == name)

    def learning_rates(self, arm: ArmConfig) -> tuple[float, ...]:
        return arm.learning_rates or self.sweep.learning_rates

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
        if "wallclock" in self.matching and "parameters" not in self.matching:
            raise ValueError('matching "wallclock" trains the parameter-matched widths; add "parameters"')
        if "wallclock" in self.matching and not self.speed.rounds:
            raise ValueError('matching "wallclock" needs measured step times; set speed.rounds to 5 or more')
        return self


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
    flops_per_token: float
    """Training FLOPs: forward and backward."""
    mismatch: float
    """Relative difference of what is matched from the reference arm's; positive = larger."""


class Trial(Section):
    """One training run of the comparison."""

    name: str
    kind: Literal["sweep", "final"]
    matching: Matching
    size: str
    arm: str
    seed: int
    learning_rate: float
    max_tokens: int


def load_compare_config(path: str | Path, overrides: Iterable[str] = ()) -> CompareConfig:
    """The comparison in the TOML file at `path`; a `base` path is read relative to that file."""
    table = toml_table(path)
    overrides = list(overrides)
    if isinstance(table.get("base"), str):
        table["base"] = toml_table(config_file(path).parent / table["base"])
    config = parsed(CompareConfig, with_overrides(table, overrides), str(path), overrides)
    for size in config.sizes:
        run_config(config, size, {"name": "base"}, where=f"{path}: base")
    return config


def merged(*tables: dict[str, Any]) -> dict[str, Any]:
    """Later tables win, one level deep: `model` and `train` are merged key by key."""
    result: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if both else value
    return result


def run_config(config: CompareConfig, size: SizeConfig, changes: dict[str, Any], where: str) -> RunConfig:
    """The run of `size` with `changes` on top of `[base]`; its folder lies in the comparison's `arms/`."""
    fixed = {"name": "base", "output_dir": str(config.directory / "arms")}
    together = {"tracking": {"group": config.name}}
    table = merged(together, config.base, {"model": size.model, "train": size.train}, fixed, changes)
    return parsed(RunConfig, table, where)
