"""Experiment trackers through accelerate's tracker interface: never a prompt, never a crash in mid-training.

wandb runs offline unless `tracking.wandb_mode` is `online`; a missing package, key or network is found before
the first step and said in one line.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from accelerate import Accelerator

from kanlm.config import RunConfig, UserError, one_line
from kanlm.runs import leaves

KEPT = "metrics.jsonl has every number"
INSTALL = {"wandb": "wandb", "tensorboard": "'kanlm[track]'", "trackio": "'kanlm[track]'"}


def log_with(config: RunConfig) -> str | None:
    """accelerate's name of the configured tracker; UserError where its package or wandb's key is missing."""
    name = config.tracking.tracker
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracking.tracker: {name!r} is not installed; pip install {INSTALL[name]}, or set "
            f"tracking.tracker=none"
        )
    if name == "wandb" and config.tracking.wandb_mode == "online" and not _wandb_key():
        raise UserError(
            "tracking.wandb_mode: 'online' needs an API key, and WANDB_API_KEY is not set and no `wandb "
            "login` was made; log in, or set tracking.wandb_mode=offline"
        )
    return name


def _wandb_key() -> bool:
    """Whether WANDB_API_KEY or a netrc entry of wandb's host, as `wandb login` writes it, is there."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def start_trackers(accelerator: Accelerator, config: RunConfig, run_dir: Path) -> None:
    """Start the configured tracker; UserError in one line where it cannot start (no network, a refused
    key).
    """
    name = config.tracking.tracker
    if name == "none":
        return
    named = {"name": config.name, "group": config.tracking.group}
    settings: dict[str, dict[str, Any]] = {
        "wandb": {"wandb": {**named, "dir": str(run_dir), "mode": config.tracking.wandb_mode}},
        "tensorboard": {},
        "trackio": {"trackio": named},
    }[name]
    try:
        accelerator.init_trackers(
            config.tracking.project, config=dotted(config.model_dump()), init_kwargs=settings
        )
    except failures(name) as error:
        accelerator.trackers.clear()  # a half-started tracker cannot be finished
        remedy = (
            "tracking.wandb_mode=offline or tracking.tracker=none"
            if name == "wandb"
            else "tracking.tracker=none"
        )
        raise UserError(
            f"tracking.tracker: {name} could not start ({one_line(error)}); set {remedy}"
        ) from None


def log(accelerator: Accelerator, values: dict[str, float], step: int) -> str | None:
    """Give `values` to the tracker. One that fails is given up, and the line to say of it comes back: the
    run goes on, and metrics.jsonl has every number.
    """
    for tracker in accelerator.trackers:
        try:
            tracker.log(values, step=step)
        except failures(tracker.name) as error:
            accelerator.trackers.clear()
            return f"tracking.tracker: {tracker.name} failed and is given up ({one_line(error)}); {KEPT}"
    return None


def finish(accelerator: Accelerator) -> None:
    """End the tracker; what it could not keep is one line, not an error."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except failures(tracker.name) as error:
            print(
                f"tracking.tracker: {tracker.name} did not end well ({one_line(error)}); {KEPT}",
                flush=True,
            )
    accelerator.trackers.clear()


def failures(name: str) -> tuple[type[BaseException], ...]:
    """What a tracker raises for a refused key, a lost network or a disk that it cannot write to."""
    if name == "wandb":
        import wandb

        return (wandb.errors.Error, OSError)
    if name == "trackio":
        import httpx

        return (httpx.HTTPError, sqlite3.Error, OSError)
    return (OSError,)


def dotted(table: dict[str, Any]) -> dict[str, bool | str | float | int]:
    """Nested tables as dotted keys with scalar values; None is left out, anything else becomes text."""
    return {
        key: value if isinstance(value, (bool, str, float, int)) else str(value)
        for key, value in leaves(table).items()
        if value is not None
    }
