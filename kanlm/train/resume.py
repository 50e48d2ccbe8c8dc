"""When a run may go on: same configuration, text and tokenizer; and what it goes on with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kanlm.config import RunConfig, UserError, with_found_paths
from kanlm.runs import RunDir, RunRecord, leaves, read_json
from kanlm.train import checkpoint

FREE_TO_CHANGE = {
    "output_dir",
    "data.cache_dir",
    "data.cache_url",
    "data.num_workers",
    "train.micro_batch_size",
    "train.num_threads",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.health_every",
    "train.save_every",
    "train.save_minutes",
    "train.keep_last",
    "train.keep_every",
    "train.async_checkpoint",
    "train.on_checkpoint_error",
    "train.zero_gradient_steps",
    "tracking.tracker",
    "tracking.project",
    "tracking.wandb_mode",
    "tracking.group",
}
"""Keys that may differ from those a run was started with: what is learned does not depend on them."""


@dataclass
class TrainerState:
    """What an exact resumption needs besides weights and optimiser states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    high_in_a_row: int = 0
    """Steps in a row with a loss far above a blind guess's."""
    loader: dict[str, Any] = field(default_factory=dict)
    silent: list[str] | None = None
    """Parameters whose gradient has always been zero so far; None before the first step."""
    scaler: dict[str, Any] | None = None
    """fp16 only: the gradient scaler."""
    world_size: int = 1


def check_same_run(config: RunConfig, run: RunDir) -> None:
    """UserError naming the first differing key where the folder of `run` holds another configuration."""
    if not run.config.exists():
        return
    # From another directory the same command reads its relative paths from where the run was trained.
    before = leaves(with_found_paths(read_json(run.config), run.root))
    now = leaves(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if key not in FREE_TO_CHANGE and before.get(key) != now.get(key):
            raise UserError(
                f"{run.root}: holds a run with another configuration: {key} was {before.get(key)!r}, is now "
                f"{now.get(key)!r}; choose another name, change it back, or delete the folder"
            )


def finished_record(config: RunConfig, run: RunDir) -> RunRecord | None:
    """The record of a run that has nothing left to do, its last checkpoint being intact.

    UserError where the folder of `run` holds another configuration's run, finished or not.
    """
    check_same_run(config, run)
    if not run.record.exists():
        return None
    try:
        record = RunRecord.model_validate(read_json(run.record))
        if record.state != "finished":
            return None
        checkpoint.verify(run.checkpoint(record.step))
    except (OSError, ValueError):  # damaged: the run goes on from what is intact
        return None
    return record
