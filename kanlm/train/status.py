"""Where a run stands, read from its folder alone; also while it trains, and from another machine."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from kanlm.config import UserError
from kanlm.runs import RunDir, RunRecord, last_metrics, read_json, step_of
from kanlm.train.lock import is_locked


def status(run_dir: str | Path) -> str:
    """A few lines on the run in `run_dir`: state, progress, speed, last numbers, checkpoints.

    UserError where the folder holds no run. A record that says "running" without a process that holds the
    run's lock is the record of a killed run.
    """
    run = RunDir(run_dir)
    if not run.record.exists():
        raise UserError(f"{run.root}: no run.json; not the folder of a run that has started")
    record = RunRecord.model_validate(read_json(run.record))
    last = last_metrics(run)
    # run.json is written every few seconds, metrics.jsonl with every log line
    step, tokens = max(record.step, last.get("step", 0)), max(record.tokens, last.get("tokens", 0))
    lines = [f"{run.root.name}: {described_state(run, record)}"]
    lines += [
        f"  step        {step:,} of {record.total_steps:,} ({step / record.total_steps:.1%}), "
        f"{tokens:,} tokens"
    ]
    if "loss" in last:
        lines += [f"  loss        {last['loss']:.4f} nats/token, learning rate {last['lr']:.2e}"]
    if "validation_bits_per_byte" in last:
        lines += [f"  validation  {last['validation_bits_per_byte']:.4f} bits/byte"]
    if record.tokens_per_second:
        lines += [
            f"  speed       {record.tokens_per_second:,.0f} tokens/s, {duration(record.seconds)} of training"
        ]
    if record.state == "running" and "seconds_left" in last:
        lines += [f"  left        {duration(last['seconds_left'])}"]
    if last.get("skipped_steps"):
        lines += [f"  skipped     {last['skipped_steps']} steps with numbers that were not finite"]
    steps = [str(step_of(folder)) for folder in run.checkpoint_folders()]
    lines += [f"  checkpoints {', '.join(steps) or 'none yet'}"]
    damaged = sorted(path.name for path in run.checkpoints.glob("damaged-*"))
    if damaged:
        lines += [f"  damaged     {', '.join(damaged)}"]
    if (run.hf / "config.json").exists():
        lines += [f"  exported    {run.hf}"]
    return "\n".join(lines)


def described_state(run: RunDir, record: RunRecord) -> str:
    if record.state == "running" and not is_locked(run):
        return "not running; its process ended without a word (killed?); run the same command again to go on"
    if record.state == "running":
        return f"running (process {record.process_id})"
    if record.state == "interrupted":
        return "interrupted; run the same command again to go on"
    return f"failed: {record.failure}" if record.state == "failed" else record.state


def fraction_done(run: RunDir) -> float:
    """The part of a run's training that is done, read while it trains."""
    if not run.record.is_file():
        return 0.0
    record = read_json(run.record)
    if record["state"] in ("finished", "failed"):
        return 1.0
    step = max(record["step"], last_metrics(run).get("step", 0))
    return step / record["total_steps"] if record["total_steps"] else 0.0


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
