"""Run a comparison: plan, sweep, train each arm and seed in a process of its own, export, evaluate, report.

Every stage leaves an artifact and is skipped where its artifact is there, so that the same command goes on
where it stopped.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from kanlm.compare import jobs
from kanlm.compare.artifacts import CompareDir, TrialDir, fraction_done, load, state_of
from kanlm.compare.jobs import Processes, Progress, launch_command, said_last, say
from kanlm.compare.judging import held_out_documents, judge_run
from kanlm.compare.plan import final_trials, known_trials, planned_arms, sweep_trial, swept_arms
from kanlm.compare.report import report, summary
from kanlm.compare.schema import (
    MATCHINGS,
    CompareConfig,
    PlannedArm,
    Trial,
    changed_keys,
    load_compare_config,
)
from kanlm.compare.speed import measured_speed, step_speeds
from kanlm.compare.sweep import Axes, Point, best_point, chosen_rates, edges, next_points, refinement
from kanlm.compare.tracking import track_outcome
from kanlm.config import RunConfig, UserError, parsed
from kanlm.data import TokenLoader, documents, token_cache, tokenizer_for
from kanlm.evaluation.baselines import kneser_ney_by_order, xz_bits_per_byte
from kanlm.runs import provenance, read_json, write_json
from kanlm.train.status import held


@dataclass
class Study:
    """A comparison under way: what was planned, and where it lies."""

    config: CompareConfig
    directory: CompareDir
    base: RunConfig
    """The first size's: text and tokenizer are those of all."""
    vocab_size: int
    arms: list[PlannedArm]
    judging: threading.Lock = field(default_factory=threading.Lock)
    """One run is judged at a time: loading a model changes what all threads share."""


def compare(toml_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Do the comparison that `toml_path` describes and return the path of its report.html.

    UserError for mistakes in the file, and where the folder holds runs of another configuration. A training
    process that dies is shown in the report; the comparison goes on and tries it again when it is called
    again.
    """
    started = time.perf_counter()
    study = planned_study(load_compare_config(toml_path, overrides))
    speed = ensure_speed(study)
    sweep = run_sweep(study)
    trials = final_trials(study.config, study.arms, chosen_rates(sweep), step_speeds(speed))
    run_trials(study, trials, sweep)
    ensure_baselines(study)
    path = report(study.directory.root)
    track_outcome(load(study.directory.root), read_json(study.directory.report_json))
    say(f"\n{summary(study.directory.root)}\n")
    say(f"{timedelta(seconds=round(time.perf_counter() - started))} in all; report: {path}")
    return path


def planned_study(config: CompareConfig) -> Study:
    """The text is read, widths are solved and said; the folder is begun, or found to be of this file."""
    disable_progress_bar()
    directory = CompareDir(config.directory)
    base = config.first_run
    say(f"comparison {config.name}: {', '.join(arm.name for arm in config.arms)} in {directory.root}/")
    tokenizer = tokenizer_for(base)
    study = Study(config, directory, base, len(tokenizer), planned_arms(config, len(tokenizer)))
    for arm in study.arms:
        say(arm.line)
    manifests = {
        "train": TokenLoader(base, tokenizer).manifest,
        "validation": token_cache(base, tokenizer, "validation").manifest,
    }
    size = "streamed text" if base.data.streaming else f"{manifests['train']['tokens']:,} training tokens"
    say(
        f"  text: {manifests['train']['source']}, {size} and {manifests['validation']['tokens']:,} held out, "
        f"vocabulary {len(tokenizer):,}"
    )
    begin_folder(study, manifests)
    return study


def begin_folder(study: Study, manifests: dict[str, Any]) -> None:
    """compare.json; where the evaluation settings changed, what was judged by the old ones is removed.

    Nothing is written where a run in the folder was trained with another configuration.
    """
    directory, dumped = study.directory, study.config.model_dump(mode="json")
    before = read_json(directory.compare)["config"] if directory.compare.is_file() else None
    if before is not None:
        refuse_changed(study, known_trials(study.config, study.arms))
        if before["evaluation"] != dumped["evaluation"]:
            directory.baselines.unlink(missing_ok=True)
            for run in map(TrialDir, directory.arms.glob("*")):
                for path in (run.heldout, run.samples, run.functions):
                    path.unlink(missing_ok=True)
    kept = ("source", "licence", "documents", "bytes", "words", "tokens", "text_tokens", "sha256")
    data: dict[str, Any] = {"vocab_size": study.vocab_size, "block_size": study.base.data.block_size}
    # of a streamed text the counts are not known: null
    data |= {split: {key: manifest.get(key) for key in kept} for split, manifest in manifests.items()}
    write_json(directory.compare, {"config": dumped, "provenance": provenance(), "data": data})


def refuse_changed(study: Study, trials: Sequence[Trial]) -> None:
    """UserError where a trial's folder was trained with another configuration; it names what changed."""
    for trial in trials:
        stored = study.directory.run(trial.name).config
        if not stored.is_file():
            continue
        before = parsed(RunConfig, read_json(stored), str(stored)).model_dump(mode="json")
        changes = changed_keys(before, trial.run.model_dump(mode="json"))
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UserError(
                f"{stored.parent}: trained with another configuration than this file's: {changes[0]}{more}; "
                f"choose another name, or delete {study.directory.root}"
            )


def write_plan(study: Study, sweep: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> None:
    """plan.json."""
    plan = {
        "arms": [arm.model_dump(mode="json") for arm in study.arms],
        "sweep": list(sweep),
        "trials": [trial.model_dump(mode="json") for trial in trials],
    }
    write_json(study.directory.plan, plan)


def run_sweep(study: Study) -> list[dict[str, Any]]:
    """Try rates until every arm has its best, the same number of trials for each of a size.

    One row for each size and arm: the rates that were chosen, with all that was tried. UserError where no
    trial of an arm finished.
    """
    arms = swept_arms(study.config, study.arms)
    tried: dict[tuple[str, str], dict[Point, float]] = {(arm.size, arm.arm): {} for arm in arms}
    while wanted := next_trials(study, tried):
        trials = [sweep_trial(study.config, arm, point.rates) for arm, point in wanted]
        run_trials(study, trials)
        for (arm, point), trial in zip(wanted, trials, strict=True):
            tried[arm.size, arm.arm][point] = validation_loss(study, trial)
        refuse_all_failed(study, tried)
    return [sweep_row(study, arm, tried[arm.size, arm.arm]) for arm in arms]


def next_trials(
    study: Study, tried: dict[tuple[str, str], dict[Point, float]]
) -> list[tuple[PlannedArm, Point]]:
    """What every arm wants to try; when none does, what arms with fewer trials than others refine."""
    arms = swept_arms(study.config, study.arms)
    wanted = [
        (arm, point) for arm in arms for point in next_points(axes_of(study, arm), tried[arm.size, arm.arm])
    ]
    if wanted:
        return sorted(wanted, key=lambda pair: pair[1].learning_rate)
    most = {arm.size: max(len(tried[arm.size, other.arm]) for other in arms) for arm in arms}
    return [
        (arm, refinement(tried[arm.size, arm.arm]))
        for arm in arms
        if 0 < len(tried[arm.size, arm.arm]) < most[arm.size]
    ]


def axes_of(study: Study, arm: PlannedArm) -> Axes:
    chosen = study.config.arm(arm.arm)
    kan_rates = study.config.kan_learning_rates(chosen) if arm.coefficients else ()
    return Axes(study.config.learning_rates(chosen), kan_rates, study.config.sweep.extend)


def validation_loss(study: Study, trial: Trial) -> float:
    """Of the finished run; infinite where it is not finished."""
    run = study.directory.run(trial.name)
    if state_of(run)[0] != "finished":
        return math.inf
    loss = read_json(run.record)["final_validation"]["loss"]
    return loss if math.isfinite(loss) else math.inf


def refuse_all_failed(study: Study, tried: dict[tuple[str, str], dict[Point, float]]) -> None:
    for (size, arm), points in tried.items():
        if points and all(math.isinf(loss) for loss in points.values()):
            raise UserError(
                f"sweep: no learning rate of arm {arm} finished training; lower sweep.learning_rates or see "
                f"{study.directory.arms}/sweep-{size}-{arm}-*/train.log"
            )


def sweep_row(study: Study, arm: PlannedArm, tried: dict[Point, float]) -> dict[str, Any]:
    """What was tried and chosen; without a sweep, the rates that are configured."""
    if not tried:
        train = study.config.runs[arm.size].train.model_copy(update=arm.train)
        best, trials = Point(train.learning_rate, train.kan_learning_rate), []
    else:
        best = best_point(tried)
        trials = [
            {
                "learning_rate": point.learning_rate,
                "kan_learning_rate": point.kan_learning_rate,
                "loss": None if math.isinf(loss) else loss,
                "state": state_of(study.directory.run(sweep_trial(study.config, arm, point.rates).name))[0],
            }
            for point, loss in tried.items()
        ]
    return {
        "size": arm.size,
        "arm": arm.arm,
        "learning_rate": best.learning_rate,
        "kan_learning_rate": best.kan_learning_rate,
        "on_edge": edges(tried) if tried else [],
        "trials": trials,
    }


def run_trials(study: Study, trials: Sequence[Trial], sweep: Sequence[dict[str, Any]] = ()) -> None:
    """Train what is not finished, `jobs` at once; a run that is reported is judged and shown at once.

    plan.json is written before, with the rates that the `sweep` chose, once it is over.
    """
    refuse_changed(study, trials)
    write_plan(study, sweep, trials)
    work = {trial.name: trial for trial in trials}  # trials that train the same have one run
    by_key = {(arm.matching, arm.size, arm.arm): arm for arm in study.arms}
    cost = {
        trial.name: trial.max_tokens * by_key[trial.matching, trial.size, trial.arm].flops_per_token
        for trial in work.values()
    }

    def fraction() -> float:
        done = [cost[name] * fraction_done(study.directory.run(name)) for name in work]
        return math.fsum(done) / math.fsum(cost.values())

    progress = Progress(fraction)

    def one(processes: Processes, numbered: tuple[int, Trial]) -> None:
        number, trial = numbered
        if (
            train_trial(study, processes, trial, f"{trial.kind} {number}/{len(work)}")
            and trial.kind == "final"
        ):
            with study.judging:
                judge_run(study.config, study.directory.run(trial.name), study.base, trial, say)

    try:
        jobs.run_all(one, list(enumerate(work.values(), 1)), study.config.jobs, progress)
    finally:
        progress.close()


def train_trial(study: Study, processes: Processes, trial: Trial, place: str) -> bool:
    """Train `trial` unless it is finished; whether there is a finished run afterwards.

    UserError for a mistake that the run's record tells, where no record was begun, and after a signal.
    """
    run, path = study.directory.run(trial.name), study.directory.config(trial.name)
    if held(run):  # of a comparison that was killed, a training process can be left
        say(f"{place}: {trial.name} is being trained by another process; waiting for it")
        while held(run):
            time.sleep(0.5)
    state, reason = state_of(run)
    if state == "diverged":
        say(f"{place}: {trial.name} diverged before: {reason}")
    if state in ("finished", "diverged"):
        return state == "finished"
    write_json(path, trial.run)
    run.failure.unlink(missing_ok=True)
    say(f"{place}: {trial.name}, learning rate {trial.learning_rate:g}, {trial.max_tokens:,} tokens")
    command = launch_command(study.config.launch, path, study.config.jobs)
    returncode, tail = processes.run(command, run.log)
    state, reason = state_of(run)
    if state == "finished":
        return True
    processes.raise_if_stopped()
    if state == "mistaken":
        raise UserError(f"{trial.name}: {reason}")
    if state == "interrupted" and returncode == 0:
        raise UserError(f"{trial.name}: interrupted; run the same command again to go on")
    if state != "diverged":
        message = said_last(tail)
        write_json(run.failure, {"returncode": returncode, "message": message, "lines": tail})
        if returncode > 0 and not run.record.is_file():
            raise UserError(f"{trial.name}: training did not begin: {message} (see {run.log})")
        reason = f"exit status {returncode}: {message}"
    say(f"{place}: {trial.name} FAILED: {reason} (see {run.log})")
    return False


def ensure_speed(study: Study) -> dict[str, Any] | None:
    """speed.json, measured again where arms, widths or rounds changed."""
    rounds, path = study.config.speed.rounds, study.directory.speed
    if not rounds:
        return None
    arms = [arm for arm in study.arms if MATCHINGS[arm.matching].budget == "tokens"]
    wanted = sorted((arm.matching, arm.size, arm.arm, arm.intermediate_size) for arm in arms)
    if path.is_file():
        stored = read_json(path)
        keys = ("matching", "size", "arm", "intermediate_size")
        if sorted(tuple(row[key] for key in keys) for row in stored["arms"]) == wanted:
            if stored["rounds"] == rounds:
                return stored
    say(f"step times: {rounds} rounds of all arms in turns")
    speed = measured_speed(study.config, arms, study.vocab_size, rounds, study.config.speed.warmup)
    write_json(path, speed)
    return speed


def ensure_baselines(study: Study) -> None:
    """baselines.json: what needs no neural network, trained on the same text, on the same held-out text."""
    config, directory, base = study.config, study.directory, study.base
    if directory.baselines.is_file():
        return
    rows: list[dict[str, Any]] = []
    if config.evaluation.baselines and base.data.streaming and base.data.max_documents is None:
        say("baselines: none; they would read the whole of a streamed text (data.max_documents bounds it)")
    elif config.evaluation.baselines:
        say("baselines: Kneser-Ney n-grams and xz -9 on the same text")
        training = list(documents(base, "train"))
        held_out = list(held_out_documents(config, base))
        by_order = kneser_ney_by_order(training, held_out)
        best = min(by_order, key=by_order.__getitem__)
        rows = [
            {
                "name": f"{best}-gram",
                "what": f"Kneser-Ney over bytes, the best of orders {min(by_order)} to {max(by_order)}, "
                "counts of the training text",
                "bits_per_byte": by_order[best],
                "orders": by_order,
            },
            {
                "name": "xz -9",
                "what": "what the held-out text adds to the compressed training text",
                "bits_per_byte": xz_bits_per_byte(training, held_out),
            },
        ]
    write_json(directory.baselines, rows)
