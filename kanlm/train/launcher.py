"""What a training process owes its launcher: to end with it, and not to complain in a chorus.

`accelerate launch` of one process passes no signal on: SIGTERM or SIGKILL to it would leave the training
process running without a parent. So a training process asks the kernel for a SIGTERM of its own when the
process that launched it ends (Linux; prctl(2), PR_SET_PDEATHSIG), and then does what it does on any SIGTERM.
Imports nothing heavy, so that this comes before the seconds that torch takes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
}


def tell(line: str) -> None:
    """Print the line of a mistake, unless another process of this launch and machine has told the same.

    Processes that fail alike would all say it. torchrun gives each a file for its error, in folders side by
    side; the process that is the first to mark the line there speaks, with its number if it is not the main
    one.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", os.devnull)
    if error_file != os.devnull:
        mark = Path(error_file).parents[1] / f"told-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # no space, or not torchrun's folders: twice is better than never
            pass
    rank = os.environ.get("RANK", "0")
    speaker = "" if rank == "0" else f"process {rank}: "
    print(f"kanlm: error: {speaker}{line}", file=sys.stderr, flush=True)


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
