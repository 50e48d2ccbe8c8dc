"""Files of a comparison's folder, and how the report reads them back. Needs no torch and loads no model.

runs/NAME/
  compare.json           the resolved CompareConfig, provenance, hashes of the data
  plan.json              PlannedArm for every matching and size, the trials, the sweep's choices
  configs/TRIAL.toml     the run configuration that `accelerate launch -m kanlm train` got
  arms/TRIAL/            a run directory (kanlm.runs), and beside it
    eval/heldout.json      EvalReport of the exported folder
    samples.json           [{"prompt", "text"}]
    functions.json         learned functions and importance (kanlm.interpret)
    failure.json           exit status and last lines of a training process that died
    train.log              what the training process printed
  speed.json             training-step times of all arms, measured in turns
  baselines.json         n-gram and compressor on the same held-out text
  report.md, report.html, report.json, plots/*.svg
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kanlm.compare.schema import CompareConfig, PlannedArm, Trial
from kanlm.config import UserError, parsed
from kanlm.runs import EvalReport, RunDir, RunRecord, read_json

State = Literal["finished", "diverged", "crashed", "interrupted", "not run"]


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

    def config(self, trial: str) -> Path:
        return self.configs / f"{trial}.toml"

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
class Artifacts:
    """Everything the report is made of."""

    directory: CompareDir
    config: CompareConfig
    provenance: dict[str, Any]
    data: dict[str, Any]
    arms: list[PlannedArm]
    sweep: list[dict[str, Any]]
    results: list[Result]
    speed: dict[str, Any] | None
    baselines: list[dict[str, Any]]

    @property
    def sweep_ran(self) -> bool:
        return any(len(row["trials"]) > 1 for row in self.sweep)

    def planned(self, matching: str, size: str, arm: str) -> PlannedArm:
        return next(p for p in self.arms if (p.matching, p.size, p.arm) == (matching, size, arm))

    def at(self, matching: str, size: str, arm: str | None = None) -> list[Result]:
        """Results by seed; the reference's runs of equal parameters serve as its wall-clock runs too."""
        found = []
        for result in self.results:
            trial = result.trial
            borrowed = matching == "wallclock" and trial.arm == self.config.reference
            if trial.matching == ("parameters" if borrowed else matching) and trial.size == size:
                if arm in (None, trial.arm):
                    found.append(result)
        return sorted(found, key=lambda result: result.trial.seed)


def state_of(run: TrialDir) -> tuple[State, str]:
    """How far the trial in `run` came, and why it ended where it did not finish.

    A run that stopped itself because its loss was no number is a result. Any other failure (a full disk, a
    killed process) is shown too, and tried again by the next `kanlm compare`.
    """
    record = read_json(run.record) if run.record.is_file() else None
    if record is not None and record["state"] == "finished":
        return "finished", ""
    if record is not None and record["state"] == "failed":
        reason = str(record["failure"])
        diverged = reason.startswith("Diverged: ")
        return ("diverged", reason.removeprefix("Diverged: ")) if diverged else ("crashed", reason)
    if run.failure.is_file():
        failure = read_json(run.failure)
        return "crashed", f"exit status {failure['returncode']}: {failure['message']}"
    return ("interrupted", "") if record else ("not run", "")


def load_curve(path: Path) -> Curve:
    """The losses in a run's metrics.jsonl; a torn last line, as a killed process leaves it, is left out."""
    curve = Curve()
    if not path.is_file():
        return curve
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in row:
            curve.tokens.append(row["tokens"])
            curve.seconds.append(row["seconds"])
            curve.loss.append(row["loss"])
        if "validation_loss" in row:
            curve.validation_tokens.append(row["tokens"])
            curve.validation_seconds.append(row["seconds"])
            curve.validation_loss.append(row["validation_loss"])
    return curve


def load_result(directory: CompareDir, trial: Trial, arm: PlannedArm) -> Result:
    run = directory.run(trial.name)
    state, reason = state_of(run)
    return Result(
        trial=trial,
        arm=arm,
        state=state,
        reason=reason,
        record=RunRecord.model_validate(read_json(run.record)) if run.record.is_file() else None,
        eval=EvalReport.model_validate(read_json(run.heldout)) if run.heldout.is_file() else None,
        curve=load_curve(run.metrics),
        samples=read_json(run.samples) if run.samples.is_file() else [],
        functions=read_json(run.functions) if run.functions.is_file() else None,
    )


def load(root: str | Path) -> Artifacts:
    """Read a comparison's folder; `UserError` where it holds none."""
    directory = CompareDir(root)
    for path in (directory.compare, directory.plan):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; {directory.root} holds no comparison, run `kanlm compare` first"
            )
    stored = read_json(directory.compare)
    plan = read_json(directory.plan)
    arms = [PlannedArm.model_validate(row) for row in plan["arms"]]
    by_key = {(arm.matching, arm.size, arm.arm): arm for arm in arms}
    trials = [Trial.model_validate(row) for row in plan["trials"]]
    return Artifacts(
        directory=directory,
        config=parsed(CompareConfig, stored["config"], str(directory.compare)),
        provenance=stored["provenance"],
        data=stored["data"],
        arms=arms,
        sweep=plan["sweep"],
        results=[
            load_result(directory, trial, by_key[trial.matching, trial.size, trial.arm]) for trial in trials
        ],
        speed=read_json(directory.speed) if directory.speed.is_file() else None,
        baselines=read_json(directory.baselines) if directory.baselines.is_file() else [],
    )
