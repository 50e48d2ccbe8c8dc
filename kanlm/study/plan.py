"""What a study trains: the trials of its plan, the run of each, and the results so far."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PositiveInt, field_validator

import kanlm.study.ideas  # noqa: F401  registers its arms and starts
from kanlm.config import RunConfig, Section, UserError, config_file, did_you_mean, parse_table
from kanlm.model import KanLMConfig
from kanlm.model.ffn import ARMS
from kanlm.sizing import architecture, matched_width, parameter_counts, training_flops_per_token

ROOT = Path("runs/study")
"""Corpora, caches and runs."""
SEPARATOR = "<|endoftext|>"
FROZEN = 1e-12
"""A rate at which coefficients of about 1 stay as they are in fp32."""
AVERAGED, AVERAGED_EVERY = 8, 16
"""Of a final phase's run, the mean weights of the last 8 checkpoints, 16 steps apart, are judged, too."""
SEGMENTS = 64
"""The test text is scored in so many equal parts, whose spread is its sampling error."""
SIZES = {
    "0.1m": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "0.3m": {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 360},
    "0.6m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512},
    "1.2m": {"hidden_size": 160, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": 640},
}
"""GELU models; every other arm gets the width with as many parameters."""
OF_TRAINING = ("kan_learning_rate", "kan_betas", "weight_decay", "schedule", "max_grad_norm")
"""Keys of a trial that are keys of the run's [train], where it has them."""
OF_A_PHASE = ("name", "about", "arms", "seeds", "ladder", "matching")
"""Keys of a phase that change none of its trials."""


T = TypeVar("T")
Tried = Annotated[list[T], Field(min_length=1)]


class Settings(Section):
    """What an arm and its phase may say of a trial, each a value or a list of values that are tried."""

    tokens: PositiveInt | list[PositiveInt] | None = None
    learning_rate: float | Tried[float] | None = None
    kan_learning_rate: float | Tried[float] | None = None
    kan_betas: Tried[list[float]] | None = None
    weight_decay: float | Tried[float] | None = None
    schedule: str | Tried[str] | None = None
    max_grad_norm: float | Tried[float] | None = None
    min_lr_ratio: float | Tried[float] | None = None
    optimizer: str | Tried[str] | None = None
    hidden_norm: bool | Tried[bool] = False
    frozen: bool | float = False
    """True: the functions stay as they begin. With `functions_of`: the rate at which those were learned."""
    functions_of: int | None = None
    """The seed of a kept run whose final shapes the functions begin as."""
    waves: PositiveInt | None = None
    """So many functions of each layer begin as `gelu_wave`."""
    start: str | None = None
    shared: bool = False
    curvature: float | None = None
    repeat: int | None = None
    """A trial again, under a name of its own."""
    keep: bool = False
    """The run's folder stays."""
    zero_shot: bool = False


class Arm(Settings):
    """An entry of a phase's `arms`; keys `kan_...` of the architecture are checked with it."""

    arm: str


class Phase(Settings):
    """A phase of a plan."""

    name: str
    about: str = ""
    role: Literal["final"] | None = None
    ladder: str | None = None
    matching: str | None = None
    corpus: str
    size: Literal["0.1m", "0.3m", "0.6m", "1.2m"]
    vocab_size: PositiveInt
    tokens: PositiveInt
    seeds: list[int] = Field(min_length=1)
    arms: list[dict[str, Any]] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"seed {repeated[0]} twice; name each once")
        return seeds


def without_architecture(table: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if not k.startswith("kan_") or k in OF_TRAINING}


@dataclass(frozen=True)
class StudyFolder:
    """The folder of a study.

    plan.toml: its phases; without it, those of the shipped `study`. trials.jsonl: a line for each trial that
    is done. baselines.json: counting. functions.json: learned functions. report.md, report.json and figures:
    what `kanlm report` makes of them.
    """

    path: Path

    @property
    def plan(self) -> Path:
        own = self.path / "plan.toml"
        return own if own.is_file() else config_file("study")

    @property
    def trials(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def baselines(self) -> Path:
        return self.path / "baselines.json"

    @property
    def functions(self) -> Path:
        return self.path / "functions.json"

    def phases(self) -> list[dict[str, Any]]:
        """The plan's phases; `UserError` where one says too little."""
        path = self.plan
        try:
            plan = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        if unknown := [key for key in plan if key != "phase"]:
            raise UserError(f"{path}: {unknown[0]}: unknown key; a plan has [[phase]] tables, nothing else")
        found = plan.get("phase", [])
        if not found or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise UserError(f"{path}: no [[phase]] tables; configs/study.toml is a plan of many")
        for i, phase in enumerate(found):
            where = f"{path}: phase {phase.get('name', f'number {i + 1}')}"
            parse_table(Phase, without_architecture(phase), where)
            for arm in phase["arms"]:
                parse_table(Arm, without_architecture(arm), f"{where}: an arm, {arm.get('arm', 'no name')}")
                refuse_unused(phase, arm, where)
            if len({one["name"] for one in found[: i + 1]}) <= i:
                raise UserError(f"{where}: name: another phase has it, too; give each its own")
            refuse_unequal(phase, where)
        return found

    def trials_of(self, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """The planned trials of the phases `names` in their order, of all where there are none."""
        phases = self.phases()
        known = [phase["name"] for phase in phases]
        for name in names:
            if name not in known:
                raise UserError(f"{self.plan}: no phase {name!r}; {did_you_mean(name, known)}")
        chosen = (phase for phase in phases if not names or phase["name"] in names)
        return [trial for phase in chosen for trial in trials_of(phase)]

    def done(self) -> dict[str, dict[str, Any]]:
        """By its key, each trial that is done."""
        return {row["key"]: row for row in self.results()}

    def results(self) -> list[dict[str, Any]]:
        """The trials that are done, as they came."""
        if not self.trials.is_file():
            return []
        found = []
        for i, line in enumerate(self.trials.read_text(encoding="utf-8").splitlines()):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if missing := [key for key in ("key", "state", "arm", "seed") if key not in row]:
                    raise ValueError(f"no {missing[0]!r}")
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{self.trials}: line {i + 1}: not the JSON of a trial: {error}; delete the line, and "
                    "its trial is trained again"
                ) from None
            found.append(row)
        return found


def trials_of(phase: dict[str, Any]) -> list[dict[str, Any]]:
    """A phase's trials; lists in the plan are tried in every combination."""
    common = {key: value for key, value in phase.items() if key not in OF_A_PHASE}
    rows = []
    for arm in phase["arms"]:
        table = {**common, **arm}
        keys = [key for key, value in table.items() if isinstance(value, list)]
        for values in itertools.product(*(table[key] for key in keys)):
            rows.append({**table, **dict(zip(keys, values, strict=True))})
    # Seed after seed, so that a phase that is cut short still has paired seeds.
    return [{**row, "seed": seed} for seed in phase["seeds"] for row in rows]


def refuse_unused(phase: dict[str, Any], arm: dict[str, Any], where: str) -> None:
    """An arm without learned functions has no key of theirs, its own or its phase's, which would change its
    name alone."""
    block = ARMS.get(arm["arm"])
    if block is None or block.family == "kan":
        return
    if own := next((key for key in arm if key.startswith("kan_")), None):
        raise UserError(
            f"{where}: an arm, {arm['arm']}: {own}: it has no learned functions; leave the key out"
        )
    if common := next((key for key in phase if key.startswith("kan_")), None):
        raise UserError(
            f"{where}: {common}: its arm {arm['arm']} has no learned functions; say it of the others instead"
        )


def refuse_unequal(phase: dict[str, Any], where: str) -> None:
    """A phase that is judged has one trial of each arm and seed, and, but for equal time, equal tokens."""
    if phase.get("role") != "final":
        return
    trials = trials_of(phase)
    labels = [(label_of(trial), trial["seed"]) for trial in trials]
    if repeated := next((one for one in labels if labels.count(one) > 1), None):
        raise UserError(
            f"{where}: two trials of {repeated[0]} with seed {repeated[1]}, where a phase that is judged has "
            "one; leave role out to search"
        )
    if len({trial["tokens"] for trial in trials}) > 1 and phase.get("matching") != "wallclock":
        raise UserError(
            f"{where}: tokens: they differ between arms; matching = 'wallclock' is for equal time"
        )


def key_of(trial: dict[str, Any]) -> str:
    """A name from everything that decides the trial's result."""
    fields = [f"{key}={trial[key]}" for key in sorted(trial) if key != "role"]
    return ",".join(fields)


def name_of(trial: dict[str, Any]) -> str:
    return f"{trial['arm']}-{hashlib.sha256(key_of(trial).encode()).hexdigest()[:12]}"


def run_config(trial: dict[str, Any]) -> RunConfig:
    """The run of a trial, its width solved to the parameters of the GELU model of its size."""
    corpus = ROOT / "data" / trial["corpus"]
    sizes = SIZES[trial["size"]]
    shape: dict[str, Any] = {"vocab_size": trial["vocab_size"], "max_position_embeddings": 128, **sizes}
    base = KanLMConfig(**{**shape, "ffn_type": "gelu"})
    own = {key: value for key, value in trial.items() if key.startswith("kan_") and key not in OF_TRAINING}
    own["hidden_norm"] = trial.get("hidden_norm", False)
    own_base = KanLMConfig(**{**shape, **own, "ffn_type": "gelu"})
    sized, _ = matched_width(own_base, trial["arm"], parameter_counts(base).non_embedding)
    train_table = {
        "max_tokens": trial["tokens"],
        "batch_size": 8,
        "optimizer": trial.get("optimizer", "muon"),
        "learning_rate": trial["learning_rate"],
        "eval_every": 0,
        "save_minutes": 60.0,
        "save_every": AVERAGED_EVERY if trial.get("role") == "final" else 0,
        "keep_last": AVERAGED,
        "min_lr_ratio": trial.get("min_lr_ratio", 0.1),
    }
    if trial.get("frozen"):
        train_table["kan_learning_rate"] = FROZEN
    for name in OF_TRAINING:
        if name in trial:
            train_table[name] = trial[name]
    table = {
        "name": name_of(trial),
        "output_dir": str(ROOT / "runs"),
        "seed": trial["seed"],
        "model": {**sizes, **own, "ffn_type": trial["arm"], "intermediate_size": sized.intermediate_size},
        "tokenizer": {"vocab_size": trial["vocab_size"]},
        "data": {
            "source": f"{corpus}.train.txt",
            "validation_source": f"{corpus}.valid.txt",
            "document_separator": SEPARATOR,
            "block_size": 128,
            "cache_dir": str(ROOT / "cache"),
        },
        "train": train_table,
    }
    return parse_table(RunConfig, table, "study")


LABELS = (
    "arm",
    "hidden_norm",
    "kan_num_groups",
    "kan_grid_size",
    "kan_initial",
    "kan_basis",
    "kan_betas",
    "curvature",
    "start",
    "min_lr_ratio",
    "weight_decay",
)
"""Keys that make another arm of a trial."""


def label_of(row: dict[str, Any]) -> str:
    """The arm of a trial for a reader, e.g. `gelu, normed`."""
    parts = [row["arm"]] + (["normed"] if row.get("hidden_norm") else [])
    if "functions_of" in row:
        shapes = "frozen at shapes" if row.get("frozen") else "from shapes"
        parts.append(f"{shapes} of seed {row['functions_of']}")
    elif row.get("frozen"):
        parts.append("frozen")
    if "waves" in row:
        parts.append(f"{row['waves']} functions of a layer from gelu_wave")
    if row.get("shared"):
        parts.append("one function for all layers")
    return ", ".join(parts + [f"{key}={row[key]}" for key in LABELS[2:] if key in row])


def rates_of(row: dict[str, Any]) -> str:
    own = f" / {row['kan_learning_rate']:g}" if "kan_learning_rate" in row else ""
    own = " / 0" if row.get("frozen") else own
    return f"{row['learning_rate']:g}{own}"


def megaflops(trial: dict[str, Any]) -> float:
    """Of a training step, for each token."""
    return training_flops_per_token(architecture(run_config(trial)), 128) / 1e6
