"""The order of samples as a pure function of (seed, indexes).

A plan maps *positions* of an endless global sequence to things to load. Nothing is drawn, buffered or kept:
position 10 billion costs as much as position 0, so a run resumes by knowing its step, on any number of ranks.

Shuffles are keyed permutations computed on the fly (a generalised Feistel network over a × a ≥ n with
cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no table of n entries, every
epoch another key.

    plan = PairsPlan(ShardSet.open("data/cc3m"), seed=0)
    plan.locate(np.arange(4096))            # sample ids at global positions 0..4095
    plan.fingerprint()                      # plain dict for the checkpoint
    check_fingerprint(saved, plan.fingerprint())   # ValueError saying what changed

A plan for another kind of data gives the same three things: ``len``, ``locate`` and ``fingerprint``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from .shards.reader import ShardSet

_ROUNDS = 7
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit key from integers (splitmix64 chained): ``mix(seed, epoch)`` and the like."""
    state = 0
    for value in values:
        state = (state + _GOLDEN + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def mix_array(key: int, values: np.ndarray) -> np.ndarray:
    """:func:`mix` of ``(key, value)`` for every value: uint64 of the same shape."""
    state = np.uint64((mix(key) + _GOLDEN) & _MASK) + values.astype(np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Permutation:
    """A keyed bijection of ``range(size)``, O(1) in memory and per element.

    Args:
        size: number of elements, 1 to 2**62.
        key: any integer; another key is another order.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"permutation of {size} elements given, expected 1 to 2**62")
        self.size = size
        self._side = math.isqrt(size - 1) + 1
        self._keys = [mix(key, 0x5EED, i) for i in range(_ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Images of ``index`` (integers in ``range(size)``, any shape): int64 of that shape."""
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"index {index.min()}..{index.max()} given, expected 0..{self.size - 1}")
        out = self._encrypt(index.reshape(-1).astype(np.uint64))
        # At most 2 * sqrt(size) of the values fall outside: walk those on until they are inside.
        while (outside := np.flatnonzero(out >= np.uint64(self.size))).size:
            out[outside] = self._encrypt(out[outside])
        return out.astype(np.int64).reshape(index.shape)

    def _encrypt(self, value: np.ndarray) -> np.ndarray:
        side = np.uint64(self._side)
        left, right = value // side, value % side
        for key in self._keys:
            left, right = right, (left + mix_array(key, right) % side) % side
        return left * side + right


class Plan(Protocol):
    """What a loader needs of an order of data; positions run over all epochs without end."""

    def __len__(self) -> int:
        """Positions in one epoch."""
        ...

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """What lies at the global ``positions`` [n]: ids [n, …] that the loader's fetcher understands."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Plain, flat description of everything the order depends on."""
        ...


class PairsPlan:
    """Order of single samples: all of them once an epoch, in another order every epoch.

    Args:
        shards: the indexed shards.
        seed: of the shuffle.
        shuffle: False keeps the order of the shards (evaluation).

    Raises:
        ValueError: the shards hold no sample.
    """

    def __init__(self, shards: ShardSet, *, seed: int = 0, shuffle: bool = True) -> None:
        if len(shards) == 0:
            raise ValueError(
                f"{shards.describe()} holds no sample, expected at least one; "
                "`interloom data verify DIR` says what is wrong"
            )
        self.shards, self.seed, self.shuffle = shards, seed, shuffle

    def __len__(self) -> int:
        return len(self.shards)

    def locate(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids [n] of the global positions [n]."""
        positions = np.asarray(positions, dtype=np.int64)
        epoch, index = np.divmod(positions, len(self))
        if not self.shuffle:
            return index
        ids = np.empty_like(index)
        for number in np.unique(epoch):
            rows = epoch == number
            ids[rows] = Permutation(len(self), mix(self.seed, int(number)))(index[rows])
        return ids

    def fingerprint(self) -> dict[str, Any]:
        """Seed, order and the digest of every shard and index."""
        return {
            "kind": "pairs",
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order of shards": self.shards.order(),
            "shards": self.shards.digests(),
        }


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any], what: str = "the data") -> None:
    """Refuse to continue a run on other data than it began with.

    Raises:
        ValueError: names every difference: seed, options, and shards added, removed or changed.
    """
    changes: list[str] = []
    for name in sorted({*saved, *current}):
        old, new = saved.get(name), current.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for verb, keys in (
                ("removed", [key for key in old if key not in new]),
                ("added", [key for key in new if key not in old]),
                ("changed", [key for key in old if key in new and old[key] != new[key]]),
            ):
                if keys:
                    shown = ", ".join(map(str, keys[:5])) + (" …" if len(keys) > 5 else "")
                    changes.append(f"{len(keys)} of {name} {verb} ({shown})")
        else:
            changes.append(f"{name} was {old!r} and is {new!r}")
    if changes:
        raise ValueError(
            f"{what} changed since the checkpoint was written: {'; '.join(changes)}; restore it to continue "
            "exactly, or start a new run from the weights"
        )
