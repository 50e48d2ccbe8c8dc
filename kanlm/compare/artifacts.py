"""Files of a comparison's folder, and how the report reads them back. Needs no torch and loads no model.

runs/NAME/
  compare.json           the resolved CompareConfig, provenance, hashes of the data
  plan.json              PlannedArm for every matching and size, the trials, the sweep's choices
  configs/TRIAL.json     the run configuration that `accelerate launch -m kanlm train` got
  arms/TRIAL/            a run directory (kanlm.runs), and beside it
    eval/heldout.json      EvalReport of the exported folder
    samples.json           [{"prompt", "text"}]
    functions.json         learned functions and importance (kanlm.interpret)
    failure.json           exit status and last lines of a training process that died
    train.log              what the training process printed
  speed.json             training-step times of all arms, measured in turns
  baselines.json         n-gram and compressor on the same held-out text
  report.md, report.html, report.json, plots/*.svg
  bundle.json            instead of all but the reports: what `kanlm report` reads, by relative path
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError

from kanlm.compare.judgement import Family, learned_nothing
from kanlm.compare.schema import MATCHINGS, CompareConfig, Matching, PlannedArm, Trial
from kanlm.config import UserError, parse_table
from kanlm.runs import (
    EvalReport,
    RunDir,
    RunRecord,
    metrics_rows,
    named_errors,
    read_json,
    write_json,
)
from kanlm.stats import standard_error

State = Literal["finished", "diverged", "mistaken", "crashed", "interrupted", "not run"]
BUNDLED = ("run.json", "eval/heldout.json", "samples.json", "functions.json", "failure.json", "metrics.jsonl")
"""Files of a trial's folder that a report is made of."""
COLOURS: dict[Family, tuple[str, ...]] = {
    "kan": ("#c2410c", "#b4257e", "#a16207", "#7c2d12", "#db2777"),
    "mlp": ("#1d4ed8", "#0e7490", "#475569", "#4338ca"),
    "control": ("#15803d", "#4d7c0f"),
}
"""Of arms in pictures: warm for KANs, cool for MLPs, green for controls."""
_AGAIN = "copy it again, or delete it and run `kanlm compare` again"


class Sample(BaseModel):
    prompt: str
    text: str


class DrawnCurve(BaseModel):
    module: str
    label: str
    x: list[float]
    y: list[float]


class Functions(BaseModel):
    caption: str
    curves: list[DrawnCurve]
    layers: list[dict[str, Any]]


class Baseline(BaseModel):
    name: str
    what: str
    bits_per_byte: float


class SpeedRow(BaseModel):
    matching: Matching
    size: str
    arm: str
    step_seconds: list[float]
    median_seconds: float
    tokens_per_second: float
    low: float
    high: float


class Speed(BaseModel):
    rounds: int
    arms: list[SpeedRow]
    tokens_per_step: int


class Plan(BaseModel):
    arms: list[dict[str, Any]]
    sweep: list[dict[str, Any]]
    trials: list[dict[str, Any]]


class Stored(BaseModel):
    config: dict[str, Any]
    provenance: dict[str, Any]
    data: dict[str, Any]


class CompareDir:
    """The paths of one comparison; creates nothing."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.compare = self.root / "compare.json"
        self.plan = self.root / "plan.json"
        self.configs = self.root / "configs"
        self.arms = self.root / "arms"
        self.speed = self.root / "speed.json"
        self.baselines = self.root / "baselines.json"
        self.plots = self.root / "plots"
        self.report_json = self.root / "report.json"
        self.report_md = self.root / "report.md"
        self.report_html = self.root / "report.html"
        self.bundle = self.root / "bundle.json"

    def config(self, trial: str) -> Path:
        return self.configs / f"{trial}.json"

    def run(self, trial: str) -> TrialDir:
        return TrialDir(self.arms / trial)


class TrialDir(RunDir):
    """A run directory with the files that a comparison adds."""

    def __init__(self, root: str | Path):
        super().__init__(root)
        self.heldout = self.eval / "heldout.json"
        self.samples = self.root / "samples.json"
        self.functions = self.root / "functions.json"
        self.failure = self.root / "failure.json"
        self.log = self.root / "train.log"


@dataclass(frozen=True)
class Curve:
    """Training and validation losses in nats/token; all lists of one kind have the same length."""

    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation_tokens: list[float] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What one trial left on disk."""

    trial: Trial
    arm: PlannedArm
    state: State
    reason: str = ""
    record: RunRecord | None = None
    eval: EvalReport | None = None
    curve: Curve = Curve()
    samples: list[dict[str, str]] = field(default_factory=list)
    functions: dict[str, Any] | None = None


@dataclass(frozen=True)
class ArmRuns:
    """One arm at one matching and size: what was planned, and what its runs left."""

    planned: PlannedArm
    results: list[Result]
    """By seed."""
    evaluations: dict[int, EvalReport]
    """Of the finished runs, by seed."""
    taught: dict[int, EvalReport]
    """Those of them that did not learn nothing."""
    bits_per_byte: float | None
    """Mean over the evaluations."""
    text_error_nats: float | None
    """Sampling error of the loss that is due to the held-out text, mean over the evaluations with parts."""
    learned_nothing: bool
    """Whether every baseline beats that mean."""
    speed: dict[str, Any] | None
    """The row of speed.json at the same rule of widths, whatever the budget."""


@dataclass(frozen=True)
class Table:
    """All arms at one matching and size, in the file's order."""

    matching: Matching
    size: str
    arms: dict[str, ArmRuns]
    results: list[Result]
    """Of all arms, by seed."""


@dataclass(frozen=True)
class Artifacts:
    """Everything the report is made of."""

    directory: CompareDir
    config: CompareConfig
    provenance: dict[str, Any]
    data: dict[str, Any]
    sweep: list[dict[str, Any]]
    results: list[Result]
    tables: list[Table]
    speed: dict[str, Any] | None
    baselines: list[dict[str, Any]]

    @property
    def shown(self) -> Table:
        """The table that pictures and claims are of: the first matching, the last size."""
        place = self.config.matching[0], self.config.sizes[-1].name
        return next(table for table in self.tables if (table.matching, table.size) == place)

    @property
    def colours(self) -> dict[str, str]:
        """A colour for each arm in all pictures."""
        palettes = {family: itertools.cycle(colours) for family, colours in COLOURS.items()}
        return {arm: next(palettes[runs.planned.family]) for arm, runs in self.shown.arms.items()}

    @property
    def sweep_ran(self) -> bool:
        return any(len(row["trials"]) > 1 for row in self.sweep)


class Files:
    """The files of a comparison: those of its folder, or, where it has none, those in its bundle.json."""

    def __init__(self, directory: CompareDir):
        self._root = directory.root
        bundled = directory.bundle.is_file() and not directory.compare.is_file()
        self._bundle: dict[str, Any] | None = read_json(directory.bundle) if bundled else None

    def text(self, path: Path) -> str | None:
        """None where there is no such file."""
        if self._bundle is not None:
            return self._bundle.get(path.relative_to(self._root).as_posix())
        if not path.is_file():
            return None
        with named_errors(path):
            content = path.read_bytes()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: damaged, not UTF-8 ({error}); {_AGAIN}") from None

    def json(self, path: Path, form: Any = Any) -> Any:
        """None where there is no such file; the content has the `form`, a type that pydantic checks."""
        text = self.text(path)
        if text is None:
            return None
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: damaged, not JSON ({error}); {_AGAIN}") from None
        try:
            TypeAdapter(form).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: damaged: {key}: {first['msg']}; {_AGAIN}") from None
        return content


def write_bundle(root: str | Path, out: str | Path) -> Path:
    """bundle.json in the folder `out`: every file that the report of `root` is made of, in one to commit.

    `kanlm report OUT` gives the same files from it. Of metrics.jsonl the losses are kept.
    """
    directory = CompareDir(root)
    load(root)  # a folder that gives no report gives no bundle
    names = {row["run"]["name"] for row in read_json(directory.plan)["trials"]}
    paths = [directory.compare, directory.plan, directory.speed, directory.baselines]
    paths += [directory.run(name).root / file for name in sorted(names) for file in BUNDLED]
    files = Files(directory)
    texts = {
        path.relative_to(directory.root).as_posix(): losses_alone(text) if path.suffix == ".jsonl" else text
        for path in paths
        if (text := files.text(path)) is not None
    }
    target = CompareDir(out).bundle
    write_json(target, texts)
    return target


def losses_alone(metrics: str) -> str:
    """The lines of a metrics.jsonl with what `load_curve` reads."""
    kept = ("tokens", "seconds", "loss", "validation_loss")
    rows = ({key: row[key] for key in kept if key in row} for row in metrics_rows(metrics.splitlines()))
    return "".join(json.dumps(row) + "\n" for row in rows if "loss" in row or "validation_loss" in row)


def state_of(run: TrialDir, files: Files | None = None) -> tuple[State, str]:
    """How far the trial in `run` came, and why it ended where it did not finish.

    A run that stopped itself because its loss was no number is a result. Any other failure (a full disk, a
    killed process) is shown too, and tried again by the next `kanlm compare`.
    """
    files = files or Files(CompareDir(run.root.parent.parent))
    record = files.json(run.record, RunRecord)
    if record is not None and record["state"] == "finished":
        return "finished", ""
    if record is not None and record["state"] == "failed":
        reason = str(record["failure"])
        states: dict[str, State] = {"diverged": "diverged", "user_error": "mistaken"}
        return states.get(record.get("failure_kind"), "crashed"), reason
    failure = files.json(run.failure)
    if failure is not None:
        return "crashed", f"exit status {failure['returncode']}: {failure['message']}"
    return ("interrupted", "") if record else ("not run", "")


def load_curve(metrics: str) -> Curve:
    """The losses in the text of a run's metrics.jsonl. KeyError: a line has a loss, but not where."""
    curve = Curve()
    for row in metrics_rows(metrics.splitlines()):
        if "loss" in row:
            curve.tokens.append(row["tokens"])
            curve.seconds.append(row["seconds"])
            curve.loss.append(row["loss"])
        if "validation_loss" in row:
            curve.validation_tokens.append(row["tokens"])
            curve.validation_seconds.append(row["seconds"])
            curve.validation_loss.append(row["validation_loss"])
    return curve


def load_result(directory: CompareDir, files: Files, trial: Trial, arm: PlannedArm) -> Result:
    run = directory.run(trial.name)
    state, reason = state_of(run, files)
    record, report = files.json(run.record, RunRecord), files.json(run.heldout, EvalReport)
    try:
        curve = load_curve(files.text(run.metrics) or "")
    except KeyError as error:
        raise UserError(f"{run.metrics}: damaged: a line lacks {error}; {_AGAIN}") from None
    return Result(
        trial=trial,
        arm=arm,
        state=state,
        reason=reason,
        record=RunRecord.model_validate(record) if record else None,
        eval=EvalReport.model_validate(report) if report else None,
        curve=curve,
        samples=files.json(run.samples, list[Sample]) or [],
        functions=files.json(run.functions, Functions),
    )


def load(root: str | Path) -> Artifacts:
    """Read a comparison's folder; `UserError` where it holds none."""
    directory = CompareDir(root)
    files = Files(directory)
    stored, plan = files.json(directory.compare, Stored), files.json(directory.plan, Plan)
    for path, content in ((directory.compare, stored), (directory.plan, plan)):
        if content is None:
            raise UserError(
                f"{path}: no such file; {directory.root} holds no comparison, run `kanlm compare` first"
            )
    config = parse_table(CompareConfig, stored["config"], str(directory.compare))
    places = [(matching, size.name) for matching in config.matching for size in config.sizes]
    try:
        arms = [PlannedArm.model_validate(row) for row in plan["arms"]]
        trials = [Trial.model_validate(row) for row in plan["trials"] if row["kind"] == "final"]
        by_key = {arm.key: arm for arm in arms}
        planned = {place: [by_key[*place, arm.name] for arm in config.arms] for place in places}
        finals = [(trial, by_key[trial.key]) for trial in trials]
    except (ValidationError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"it lacks {error}"
        raise UserError(
            f"{directory.plan}: damaged, or not of this version of kanlm ({reason}); run `kanlm "
            "compare` again"
        ) from None
    results = [load_result(directory, files, trial, arm) for trial, arm in finals]
    speed = files.json(directory.speed, Speed)
    baselines = files.json(directory.baselines, list[Baseline]) or []
    tables = []
    for place in places:
        here = [one for one in results if (one.arm.matching, one.arm.size) == place]
        here.sort(key=lambda result: result.trial.seed)
        runs = {arm.arm: arm_runs(arm, here, speed, baselines) for arm in planned[place]}
        tables.append(Table(*place, runs, here))
    return Artifacts(
        directory=directory,
        config=config,
        provenance=stored["provenance"],
        data=stored["data"],
        sweep=plan["sweep"],
        results=results,
        tables=tables,
        speed=speed,
        baselines=baselines,
    )


def arm_runs(
    arm: PlannedArm,
    results: Sequence[Result],
    speed: dict[str, Any] | None,
    baselines: Sequence[dict[str, Any]],
) -> ArmRuns:
    """The arm's part of all `results` at its matching and size."""
    own = [result for result in results if result.trial.arm == arm.arm]
    evaluations = {result.trial.seed: result.eval for result in own if result.eval}
    bits = fmean(report.bits_per_byte for report in evaluations.values()) if evaluations else None
    text_errors = [
        standard_error([nll for _, nll in report.parts], [tokens for tokens, _ in report.parts])
        for report in evaluations.values()
        if len(report.parts) > 1
    ]
    place = MATCHINGS[arm.matching].width, arm.size, arm.arm
    rows = speed["arms"] if speed else []
    at_place = [row for row in rows if (MATCHINGS[row["matching"]].width, row["size"], row["arm"]) == place]
    return ArmRuns(
        planned=arm,
        results=own,
        evaluations=evaluations,
        taught={
            seed: report
            for seed, report in evaluations.items()
            if not learned_nothing(report.bits_per_byte, baselines)
        },
        bits_per_byte=bits,
        text_error_nats=fmean(text_errors) if text_errors else None,
        learned_nothing=bits is not None and learned_nothing(bits, baselines),
        speed=at_place[0] if at_place else None,
    )


def step_speeds(speed: Mapping[str, Any] | None, reference: str) -> dict[tuple[str, str, str], float]:
    """Tokens per second by (rule of widths, size, arm), of speed.json; empty where nothing was measured.

    The reference's follow from its median time; another arm's from that and the median of the rounds' own
    ratios to the reference, so that a machine that was busy in some rounds shifts no arm against another.
    """
    rows = {
        (MATCHINGS[row["matching"]].width, row["size"], row["arm"]): row
        for row in (speed["arms"] if speed else [])
    }
    found: dict[tuple[str, str, str], float] = {}
    for (width, size, arm), row in rows.items():
        if level := rows.get((width, size, reference)):
            ratio = median(step_time_ratios(level["step_seconds"], row["step_seconds"]))
            found[width, size, arm] = level["tokens_per_second"] * ratio
    return found


def step_time_ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    """Of the first step time over the second, measured next to each other in each round."""
    return [a / b for a, b in zip(own, other, strict=True)]
