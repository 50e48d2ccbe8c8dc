"""The lock of a run's folder: one process group trains it at a time.

The lock goes with its process, so a killed one holds none.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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
        try:
            _take(lock)
        except BlockingIOError:
            raise UserError(
                f"{run.root}: another process is training this run; wait for it, or choose another name"
            ) from None
        remove_leftovers(run.config, run.record, run.metrics, run.tokenizer)
        accelerator.wait_for_everyone()
        yield


def _take(lock: TextIO) -> None:
    """Lock the open file; BlockingIOError where a process that trains has locked it."""
    while True:
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A share can be had where nobody trains: who asks, as `is_locked` does, holds one for a moment. It is
        # given back before the next try, so that of two processes that begin now one gets the lock.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(lock, fcntl.LOCK_UN)
        time.sleep(0.01)


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
