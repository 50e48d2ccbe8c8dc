"""Run a comparison: plan, sweep, train each arm and seed in a process of its own, export, evaluate, report.

Every stage leaves an artifact and is skipped where its artifact is there, so that the same command goes on
where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from kanlm.compare.artifacts import load
from kanlm.compare.heldout import ensure_baselines, judge_run
from kanlm.compare.jobs import run_trials
from kanlm.compare.plan import begin_study
from kanlm.compare.report import summary, write_report
from kanlm.compare.schema import load_compare_config
from kanlm.compare.speed import ensure_speed
from kanlm.compare.sweep import run_sweep
from kanlm.compare.tracking import track_outcome


def compare(toml_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Do the comparison that `toml_path` describes and return the path of its report.html.

    UserError for mistakes in the file, and where the folder holds runs of another configuration. A training
    process that dies is shown in the report; the comparison goes on and tries it again when it is called
    again.
    """
    started = time.perf_counter()
    config = load_compare_config(toml_path, overrides)
    study = begin_study(config)
    speed = ensure_speed(study)
    sweep = run_sweep(study, train=partial(run_trials, study))
    trials = study.final_trials(sweep, speed)
    study.write_plan(trials, sweep)
    run_trials(study, trials, finished=partial(judge_run, study))
    ensure_baselines(study)
    artifacts = load(study.directory.root)
    content = write_report(artifacts)
    track_outcome(artifacts, content)
    print(f"\n{summary(content)}\n")
    seconds = timedelta(seconds=round(time.perf_counter() - started))
    print(f"{seconds} in all; report: {artifacts.directory.report_html}", flush=True)
    return artifacts.directory.report_html
