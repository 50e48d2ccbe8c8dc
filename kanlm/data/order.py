"""Which block comes when: pure functions of the seed and a sequence's number, with no state and no memory."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from kanlm.config import UserError

CYCLE = 4096
"""Every CYCLE sequences hold the sources of a mixture in exact shares."""

_ROUNDS = 6
_U64 = np.uint64


def permute(indices: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Images of `indices` [N] int64 under the pseudo-random permutation of range(size) that `key` chooses.

    A Feistel network over the smallest even number of bits that holds `size`; what lands outside walks on
    until it is inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    assert size >= 1 and ((indices >= 0) & (indices < size)).all()
    half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half) - _U64(1)
    seed = np.zeros(1, dtype=_U64)
    for part in key:
        seed = _mixed(seed ^ _U64(part))
    keys = _mixed(seed + np.arange(_ROUNDS, dtype=_U64))
    result = indices.astype(_U64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right ^ keys[turn]) & mask)
        result[outside] = left << half | right
        outside = result >= size
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), modulo 2^64."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


class Mixture:
    """Which source gives sequence number n, and how many sequences that source has given before."""

    def __init__(self, weights: list[float], seed: int):
        shares = np.array(weights) / sum(weights) * CYCLE
        quotas = np.floor(shares).astype(int)
        for source in np.argsort(quotas - shares, kind="stable")[: CYCLE - quotas.sum()]:
            quotas[source] += 1
        if not quotas.all():
            least = int(np.argmin(quotas))
            raise UserError(
                f"data.mixture: weight {weights[least]} of source {least} is a share below 1/{CYCLE}; "
                "raise it or leave the source out"
            )
        self._quotas, self._seed = quotas, seed
        self._cycle = lru_cache(maxsize=2)(self._cycle_uncached)

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source [N], index within the source [N]) of the sequences `numbers` [N]."""
        cycles, places = np.divmod(numbers, CYCLE)
        sources, indices = np.empty_like(numbers), np.empty_like(numbers)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            order, before = self._cycle(int(cycle))
            sources[here] = order[places[here]]
            indices[here] = cycle * self._quotas[sources[here]] + before[places[here]]
        return sources, indices

    def counts(self, consumed: int) -> np.ndarray:
        """Sequences that each source has given among the first `consumed`."""
        cycle, place = divmod(consumed, CYCLE)
        order, _ = self._cycle(cycle)
        return cycle * self._quotas + np.bincount(order[:place], minlength=len(self._quotas))

    def _cycle_uncached(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of one cycle's places [CYCLE], and how often each occurred earlier in the cycle [CYCLE]."""
        slots = np.repeat(np.arange(len(self._quotas)), self._quotas)
        order = slots[permute(np.arange(CYCLE), CYCLE, (self._seed, cycle))]
        before = np.empty(CYCLE, dtype=np.int64)
        for source, quota in enumerate(self._quotas):
            before[order == source] = np.arange(quota)
        return order, before
