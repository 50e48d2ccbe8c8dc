"""Token ids that processes make for each other: each tokenises its share of a stream, and all get the whole.

Batch number n of a source is made by process n % world_size and put into a key-value store that all reach;
the last to read it deletes it. Everybody still reads the text. A process that gives nothing for SECONDS
counts as dead.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch.distributed import Store

from kanlm.config import UserError

SECONDS = 45.0
"""How long one process waits for another's tokens; a launcher ends those of a dead one within a minute."""
_POLL_SECONDS = 0.005


class Exchange:
    """What one process of `world_size` gives and takes."""

    def __init__(self, store: Store, rank: int, world_size: int):
        self.store, self.rank, self.world_size = store, rank, world_size

    def ids(
        self, key: str, number: int, make: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, lengths of the fragments) of batch `number`: by `make` here, or from whoever has made them.

        Keys are used once, and all processes ask for the same in the same order.
        """
        maker, key = number % self.world_size, f"{key}/{number}"
        if maker == self.rank:
            ids, lengths = make()
            head = np.array([len(lengths), ids.dtype.itemsize], np.int64)
            value = head.tobytes() + lengths.astype(np.int64).tobytes() + ids.tobytes()
            self.store.set(key, value)  # type: ignore[arg-type]  # takes bytes, as `get` gives them
            return ids, lengths
        self._wait_for(key, maker)
        content = self.store.get(key)
        if self.store.add(f"{key}/read", 1) == self.world_size - 1:
            self.store.delete_key(key)
            self.store.delete_key(f"{key}/read")
        count, width = np.frombuffer(content, np.int64, 2)
        lengths = np.frombuffer(content, np.int64, count, offset=16)
        return np.frombuffer(content, f"u{width}", offset=16 + 8 * int(count)), lengths

    def _wait_for(self, key: str, maker: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.store.check([key]):  # a `get` that waits would keep other threads from the store
            if time.monotonic() > deadline:
                raise UserError(
                    f"data.streaming: process {maker} has given no tokens for {SECONDS:.0f} seconds; it has "
                    "ended or hangs; run the same command again to go on"
                )
            time.sleep(_POLL_SECONDS)
