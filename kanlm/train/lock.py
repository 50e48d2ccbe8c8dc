"""The lock of a run's folder: one process group trains it at a time.

The lock goes with its process, so a killed one holds none.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kanlm.config import UserError
from kanlm.runs import RunDir, remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator


def lock_file(run: RunDir) -> Path:
    return run.root / ".lock"


@contextmanager
def locked(run: RunDir, accelerator: Accelerator) -> Iterator[None]:
    """Make the run's folder and lock it; UserError where another process trains it."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        yield
        return
    run.root.mkdir(parents=True, exist_ok=True)
    with open(lock_file(run), "w") as lock:
        for attempt in range(3):  # `is_locked` holds it for a moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 2:
                    raise UserError(
                        f"{run.root}: another process is training this run; wait for it, or choose "
                        "another name"
                    ) from None
                time.sleep(0.2)
        remove_leftovers(run.config, run.record, run.metrics, run.tokenizer)
        accelerator.wait_for_everyone()
        yield


def is_locked(run: RunDir) -> bool:
    """Whether a process trains this run now."""
    try:
        with open(lock_file(run)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def wait_until_unlocked(run: RunDir) -> None:
    """Return once no process trains this run."""
    with suppress(FileNotFoundError), open(lock_file(run)) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
