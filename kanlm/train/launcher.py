"""What a training process owes its launcher: to end with it, and not to complain in a chorus.

`accelerate launch` of one process passes no signal on: SIGTERM or SIGKILL to it would leave the training
process running without a parent. So a training process asks the kernel for a SIGTERM of its own when the
process that launched it ends (Linux; prctl(2), PR_SET_PDEATHSIG), and then does what it does on any SIGTERM.
Imports nothing heavy, so that this comes before the seconds that torch takes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
}

SECONDS_FOR_THE_FIRST = 2.0
"""Within these a launcher ends its other processes after the first of them has failed."""


def in_turn(line: str) -> str:
    """`line` at once in the main process; in another one after a while, with its number.

    Processes that fail alike would all say the same. The main one speaks first, its end ends the others, and
    they speak only where they alone have failed.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return line
    time.sleep(SECONDS_FOR_THE_FIRST * (1 + int(os.environ.get("LOCAL_RANK", "0"))))
    return f"process {rank}: {line}"


def end_with_launcher() -> bool:
    """Get SIGTERM when the launcher ends; whether there is one. A run started by hand outlives its shell."""
    parent = os.getppid()
    if sys.platform != "linux" or not is_launcher(command_line(parent)):
        return False
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def command_line(process_id: int) -> list[str]:
    """Words of a process's command line; none where it has ended."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_text(errors="replace").split("\0")
    except FileNotFoundError:
        return []


def is_launcher(words: list[str]) -> bool:
    """Whether a command line is that of accelerate's launcher or of torchrun."""
    names = {Path(word).name for word in words[:4]}  # python [-u] SCRIPT, or python [-u] -m MODULE
    return not names.isdisjoint(LAUNCHERS)
