"""Run configuration: frozen types, strict TOML, `section.key=value` overrides.

Every mistake of a user becomes one `UserError` line: key, value, rule, remedy. The `[model]` table is
kept as a plain dict here; `kanlm.sizing.architecture` checks it against the fields of `KanLMConfig`.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MATCHING_TOLERANCE = {"parameters": 0.005, "flops": 0.01}
"""Relative mismatch up to which two architectures count as equal in what they are matched by."""


class UserError(ValueError):
    """A mistake of the user: one line that names key or file, value, rule and remedy. Exit status 2."""


def one_line(error: BaseException) -> str:
    """What `error` says, without its line breaks."""
    return " ".join(str(error).split())


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a complaint about an unknown `word`: the closest of the `known` ones, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


class Section(BaseModel):
    """A frozen table of a TOML file: unknown keys, wrong types and values out of range are errors."""

    # An infinite rate passes every `gt` and is only seen when the run is ruined.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """Where text comes from: an embedded corpus, a local file or folder, or a hub id."""

    source: str = Field("stdlib", min_length=1)
    """`stdlib` (Python's own library sources), `stories` (seeded generator with known entropy), a path to a
    .txt/.jsonl/.json/.parquet/.csv/.tsv file (also .xz/.gz/.bz2), a pattern of such, a local dataset folder,
    or a hub dataset id."""
    config_name: str | None = None
    """Configuration name of a hub data set, e.g. `sample-10BT`."""
    split: str = "train"
    """Split that is trained on."""
    text_column: str = "text"
    """Column that holds the text of one document."""
    document_separator: str | None = None
    """Plain text: a line that separates documents, e.g. `<|endoftext|>`; else a file is one document."""
    weight: float = Field(1.0, ge=0)
    """Share of this source in a mixture; weights are normalised over the mixture."""


class DataConfig(SourceConfig):
    """Corpus, validation text, packing and cache."""

    validation_source: str | None = None
    """Held-out text as a source of its own; without it `validation_split`, else a share of the documents."""
    validation_split: str | None = None
    """Held-out split of `source`, e.g. `validation`."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents (by hash of their text; of a single document its tail) held out otherwise."""
    mixture: tuple[SourceConfig, ...] = Field((), strict=False)
    """Several sources with weights, of a positive sum; replaces `source`."""
    block_size: int = Field(256, ge=8)
    """Tokens in a training sequence."""
    cross_document_attention: bool = True
    """Whether a token may attend to earlier documents packed into its block."""
    streaming: bool = False
    """Tokenise while training; for corpora larger than the disk."""
    shuffle_buffer: int = Field(1024, ge=1)
    """Streaming only: blocks held for shuffling."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most this many documents of the training split."""
    cache_dir: str = "runs/cache"
    """Where tokenizers and packed tokens are kept."""
    cache_url: str | None = None
    """Where `kanlm tokenize --push` published tokenizer and tokens, which are then read instead of any text:
    an fsspec URL (s3://BUCKET/FOLDER) or a data set repository of the hub (hf://datasets/OWNER/NAME)."""
    num_workers: int = Field(0, ge=0)
    """Processes that tokenise; 0 = none besides this one, in as many threads as cores, at most 16."""

    @model_validator(mode="after")
    def published_or_streamed(self) -> DataConfig:
        if self.cache_url is not None and self.streaming:
            raise ValueError("streaming = true reads no token cache, and cache_url names one; leave one out")
        return self

    @field_validator("mixture")
    @classmethod
    def positive_sum(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        if value and sum(source.weight for source in value) <= 0:
            raise ValueError("the weights sum to 0, not to a positive number; give a source a weight > 0")
        return value


class TokenizerConfig(Section):
    """Byte-level BPE, trained on the training split unless `path` is given."""

    path: str | None = None
    """Folder or hub id of an existing tokenizer."""
    vocab_size: int = Field(4096, ge=257)
    """Size of a trained vocabulary, special tokens included."""


class TrainConfig(Section):
    """Token budget, optimiser, schedule, precision and checkpoints."""

    max_tokens: int = Field(ge=1)
    """Training tokens in all; rounded down to whole steps."""
    batch_size: int = Field(16, ge=1)
    """Sequences in an optimiser step, over all processes and accumulation steps."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Sequences in one forward pass of one process, at most batch_size / processes, which is the default."""
    trainable: Literal["all", "functions"] = "all"
    """`functions`: the coefficients of learned functions alone; everything else keeps its values."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of the matrices."""
    kan_lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of KAN coefficients over that of the matrices."""
    kan_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of KAN coefficients, whatever the matrices' is; replaces the multiplier."""
    kan_betas: tuple[float, float] | None = Field(None, strict=False)
    """Adam betas of the KAN coefficients; default: `betas`."""
    kan_optimizer: Literal["adamw", "muon"] = "adamw"
    """What trains the KAN coefficients. To Muon a layer of edge functions is one matrix over the features of
    all its inputs, which suits whitened features."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Of matrices; norms, embeddings and KAN coefficients are not decayed."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    warmup_fraction: float = Field(0.02, ge=0, lt=1)
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the steps in the final decay."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final over peak learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """0 turns clipping off."""
    z_loss: float = Field(0.0, ge=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto = bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """`torch.compile` of each decoder layer."""
    kernels: Literal["auto", "reference", "recompute", "cpu", "triton"] = "auto"
    """Implementation of the KAN operations; never saved in the model."""
    gradient_checkpointing: bool = False
    num_threads: int | None = Field(None, ge=1)
    """torch threads of a process; default: cores / processes."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines."""
    eval_every: int = Field(0, ge=0)
    """Steps between validations; 0 = only at the end."""
    eval_tokens: int | None = Field(None, ge=1)
    """Validation tokens while training; default: all. The report's numbers come from `kanlm eval`."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 = only by `save_minutes`, at the end and on a signal."""
    save_minutes: float = Field(15.0, ge=0)
    """A checkpoint is also written when the last one is this old; 0 = never."""
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    """Keep every n-th step's checkpoint for good; 0 = none."""
    async_checkpoint: bool = True
    on_checkpoint_error: Literal["stop", "continue"] = "stop"
    zero_gradient_steps: int = Field(20, ge=0)
    """Stop where a trainable parameter's gradient stays exactly zero for this many first steps; 0 = never."""
    health_every: int = Field(0, ge=0)
    """Steps between `kan_health` logs; 0 = with each validation."""

    @field_validator("max_tokens", mode="before")
    @classmethod
    def whole_number(cls, value: Any) -> Any:
        """1e6 is how people write a token budget, and to TOML it is a float."""
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("betas", "kan_betas")
    @classmethod
    def betas_in_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not all(0 <= beta < 1 for beta in value):
            raise ValueError("each beta must lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def whole_micro_batches(self) -> TrainConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Sequences in a micro-batch of one of `processes`, and micro-batches of each in a step."""
        if self.batch_size % processes:
            raise UserError(
                f"train.batch_size: {self.batch_size} sequences do not divide among {processes} processes; "
                f"choose a multiple of {processes}"
            )
        sequences = self.batch_size // processes
        micro_batch_size = min(self.micro_batch_size or sequences, sequences)
        if sequences % micro_batch_size:
            raise UserError(
                f"train.micro_batch_size: {micro_batch_size} does not divide the {sequences} sequences of "
                f"each of {processes} processes; choose a divisor of {sequences}"
            )
        return micro_batch_size, sequences // micro_batch_size


class TrackingConfig(Section):
    """Experiment trackers besides metrics.jsonl."""

    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"
    project: str = "kanlm"
    wandb_mode: Literal["online", "offline"] = "offline"
    group: str | None = None
    """wandb and trackio: shown together with the runs of this name; a comparison sets its own."""


class RunConfig(Section):
    """One training run; the whole of a `configs/*.toml` file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder."""
    output_dir: str = "runs"
    seed: int = Field(0, ge=0)
    """Initialisation; the data order has `data_seed`."""
    data_seed: int = Field(0, ge=0)
    init_from: str | None = None
    """Exported or converted folder that training begins with: its weights, architecture and tokenizer."""
    model: dict[str, Any]
    """Fields of `KanLMConfig`; `vocab_size` defaults to the tokenizer's size. Not needed with `init_from`."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="before")
    @classmethod
    def model_of_init_from(cls, table: Any) -> Any:
        return {"model": {}, **table} if isinstance(table, dict) and table.get("init_from") else table

    @model_validator(mode="after")
    def one_tokenizer(self) -> RunConfig:
        if self.init_from and self.tokenizer.path:
            raise ValueError("init_from brings its own tokenizer; leave tokenizer.path out")
        return self

    @field_validator("model")
    @classmethod
    def finite_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        def check(key: str, part: Any) -> None:
            if isinstance(part, float) and not math.isfinite(part):
                raise ValueError(f"{key}: {part} is not a finite number")
            if isinstance(part, (dict, list)):
                for name, inner in part.items() if isinstance(part, dict) else enumerate(part):
                    check(f"{key}.{name}", inner)

        for key, part in value.items():
            check(key, part)
        return value

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def step_tokens(self) -> int:
        return self.train.batch_size * self.data.block_size

    @property
    def total_steps(self) -> int:
        """Whole steps in the token budget; UserError where there is none."""
        if self.train.max_tokens < self.step_tokens:
            raise UserError(
                f"train.max_tokens: {self.train.max_tokens} is less than one step of batch_size x block_size "
                f"= {self.train.batch_size} x {self.data.block_size} = {self.step_tokens} tokens; raise it, "
                "or lower train.batch_size"
            )
        return self.train.max_tokens // self.step_tokens


def shipped_folder() -> Path:
    """Where the configurations that come with kanlm lie: in the installed package, else in the checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """The shipped runs and comparisons, by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.toml"), key=lambda path: path.stem)}


def config_file(name: str | Path) -> Path:
    """The file at the path `name`, else the shipped configuration of that name; `UserError` for neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.stem in shipped and path.suffix == ".toml":
        hint = f"{path.stem!r} alone is the one that comes with kanlm"
    elif close := difflib.get_close_matches(path.stem, shipped, n=3):
        hint = f"kanlm comes with {', '.join(close)}"
    else:
        hint = "`kanlm configs` lists those that come with kanlm"
    siblings = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
    here = f"; {path.parent}/ has: {', '.join(siblings)}" if siblings else ""
    raise UserError(f"{path}: no such config file; {hint}{here}")


def toml_table(path: str | Path) -> dict[str, Any]:
    """The parsed TOML file at `path`, or a run's config.json, or the shipped configuration of that name;
    `UserError` where there is none to read.
    """
    path = config_file(path)
    kind, load = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        table = load(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid {kind}: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected a table of settings, got a {type(table).__name__}")
    if "phase" in table:
        raise UserError(
            f"{path}: the plan of a study, neither a run nor a comparison; `kanlm study run` trains it"
        )
    return with_found_paths(table, path.parent) if path.suffix == ".json" else table


WORKING_DIRECTORY = "working_directory"
"""File of a run's folder: where it was trained, which the relative paths of its config.json start from. It is
no part of config.json, which is published."""
_PATHS = ("data.source", "data.validation_source", "data.cache_dir", "tokenizer.path", "init_from")


def with_found_paths(table: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """A run's config.json with those of its relative paths made absolute that are not found from here.

    They start from where the run was trained, or, where its folder was moved together with what lies around
    it, from as far above it as `output_dir` and `name` say.
    """
    recorded = run_dir / WORKING_DIRECTORY
    bases = [Path(recorded.read_text(encoding="utf-8").rstrip("\n"))] if recorded.is_file() else []
    below = Path(str(table.get("output_dir", "runs")), str(table.get("name", "")))
    resolved = run_dir.resolve()
    if not below.is_absolute() and resolved.parts[-len(below.parts) :] == below.parts:
        bases.append(resolved.parents[len(below.parts) - 1])
    bases = [base for base in bases if base.is_dir()]
    if not bases or Path.cwd() in bases:
        return table
    overrides = {}
    for key in _PATHS:
        value: Any = table
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, str) and (found := _found(value, bases)):
            overrides[key] = found
    table = with_overrides(table, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    if isinstance(mixture := table.get("data", {}).get("mixture"), list):
        table["data"]["mixture"] = [
            {**part, "source": _found(part.get("source", ""), bases) or part.get("source", "")}
            for part in mixture
        ]
    return table


def _found(value: str, bases: list[Path]) -> str | None:
    """The relative path or pattern `value` from the first of `bases` where it leads to something."""
    if not value or value in ("stdlib", "stories") or value.startswith(("/", "~")):
        return None
    there = (str(base / value) for base in bases)
    return next((path for path in there if Path(path).exists() or glob.glob(path)), None)


def with_overrides(table: dict[str, Any], overrides: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """A copy of `table` with each `section.key=value` set; values are TOML, a bare word is a string."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"override {override!r}: expected section.key=value, e.g. train.max_tokens=1_000_000"
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.strip().split(".")
        node = table
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"override {override!r}: {part} is a value, not a table")
        node[last] = value
    return table


def parse_table(
    kind: type[Section], table: dict[str, Any], where: str, overrides: tuple[str, ...] | list[str] = ()
) -> Any:
    """`table` as a `kind`; the first mistake becomes a one-line `UserError` that names the key, and `where`
    or the override that it comes from.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = first.get("input")
        # A rule over several keys names them itself; it has the whole table as its value.
        whole_table = first["type"] == "value_error" and isinstance(value, dict)
        unshown = first["type"] in ("missing", "extra_forbidden") or whole_table
        shown = "" if unshown else f", got {value!r} ({type(value).__name__})"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            fields = _fields_at(kind, first["loc"][:-1])
            message = f"unknown key; {did_you_mean(str(first['loc'][-1]), fields)}"
        elif first["type"] == "missing":
            message = f"required, but absent; add it to {where}"
        for override in overrides:
            set_key = override.partition("=")[0].strip()
            inside = first["type"] == "extra_forbidden" and set_key.startswith(f"{key}.")
            if key and (inside or f"{key}.".startswith(f"{set_key}.")):
                where = f"override {override!r}"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        place = f"{where}: {key}" if key else where
        raise UserError(f"{place}: {message}{shown}{more}") from None


def _fields_at(kind: type[Section], loc: tuple) -> list[str]:
    for part in loc:
        annotation = (
            kind.model_fields[part].annotation
            if isinstance(part, str) and part in kind.model_fields
            else None
        )
        if isinstance(annotation, type) and issubclass(annotation, Section):
            kind = annotation
    return list(kind.model_fields)


def load_run_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """The run configuration in the TOML file `path`, or shipped under that name, with `overrides` applied."""
    table = toml_table(path)
    if "arms" in table:
        raise UserError(
            f"{path}: a comparison, not one run: it has [[arms]]; `kanlm compare {path}` runs it, "
            "with --dry-run it shows sizes, tokens and hours"
        )
    return parse_table(RunConfig, with_overrides(table, overrides), str(path), overrides)
