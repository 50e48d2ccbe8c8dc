"""Two or more machines that train together: a lost link or machine is told within a minute, on every side.

A collective over a link that is cut waits for hours, as TCP does not say that the other end is gone. So each
process writes a count into a store of the main one every few seconds and reads those of the others. On one
machine the launcher sees a process that ends, and none of this runs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch.distributed import Store

from kanlm.runs import RunDir, RunRecord, read_json, write_json
from kanlm.train.parallel import shared_store

INTERVAL_SECONDS = 3.0
SILENT_SECONDS = 30.0
"""So long without a word from a process, or from the store, counts as lost."""
EXIT_STATUS = 1


def several_machines() -> bool:
    """Whether torchrun started processes on more than this machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


@contextmanager
def watched_machines(accelerator: Accelerator, run: RunDir) -> Iterator[None]:
    """While several machines train together, end this process with a line when one of them is lost."""
    if not several_machines():
        yield
        return

    def lost(who: str) -> str:
        kept = max((path.name for path in run.checkpoints.glob("step-*")), default="none")
        line = (
            f"{run.root.name}: {who}; its machine or the network is gone; last checkpoint: {kept}; run the "
            "same command again to go on, on any number of machines"
        )
        if accelerator.is_main_process and run.record.exists():
            record = RunRecord.model_validate(read_json(run.record))
            end = {"state": "failed", "failure": line, "failure_kind": "crashed"}
            write_json(run.record, record.model_copy(update=end))
        return line

    store = shared_store(accelerator)
    with Heartbeat(store, accelerator.process_index, accelerator.num_processes, lost):
        yield


class Heartbeat:
    """Ends this process with a line when another falls silent; `lost` says what to tell of the run.

    The main thread sits in a collective then, which nothing can interrupt, so the process ends at once; what
    is on the disk is whole, as every file of a checkpoint appears in one rename.
    """

    def __init__(self, store: Store, rank: int, world_size: int, lost: Callable[[str], str]):
        self.store, self.rank, self.world_size, self.lost = store, rank, world_size, lost
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()

    def __enter__(self) -> Heartbeat:
        # The store may keep a call waiting for longer than the silence allowed: another thread watches it.
        for name, work in (("heartbeat", self._beat), ("heartbeat watch", self._watch)):
            threading.Thread(target=work, name=name, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            try:
                self.store.set(f"heartbeat/{self.rank}", str(count))
                for other in range(self.world_size):
                    key = f"heartbeat/{other}"
                    if self.store.check([key]):
                        value = self.store.get(key)
                        if value != self._heard.get(other, (b"", 0.0))[0]:
                            self._heard[other] = value, time.monotonic()
            except RuntimeError:  # of torch.distributed: the store cannot be reached
                self._stopped.wait(INTERVAL_SECONDS)
                continue
            self._answered = time.monotonic()
            self._stopped.wait(INTERVAL_SECONDS)

    def silent(self) -> str | None:
        """Who has been silent for too long, as the beginning of a line."""
        now = time.monotonic()
        if now - self._answered > SILENT_SECONDS:
            return f"process {self.rank} has not reached the main process for {SILENT_SECONDS:.0f} seconds"
        for other, (_, heard) in sorted(self._heard.items()):
            if now - heard > SILENT_SECONDS:
                return f"process {other} has not been heard of for {SILENT_SECONDS:.0f} seconds"
        return None

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            if (who := self.silent()) is not None:
                print(self.lost(who), file=sys.stderr, flush=True)
                os._exit(EXIT_STATUS)
