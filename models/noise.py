"""Randomness of a forward pass as a function of (seed, global sample index, place of use).

Sequential generators give other numbers as soon as a batch is split differently over ranks or micro-batches.
Here every number is a hash of where it is used instead, so the same sample draws the same noise wherever and
whenever it is computed, and a second forward pass replays the first exactly.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) applied to a counter, in wrapping
64-bit arithmetic, so integers and int64 tensors give the same numbers on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_SPAN = 1 << 64
_HALF = 1 << 63
_POSITIVE = (1 << 63) - 1
_LONGEST_ROW = 1 << 32


def _wrap(value: Word) -> Word:
    """Wrap a Python integer to signed 64 bits; int64 tensors wrap by themselves."""
    return (value + _HALF) % _SPAN - _HALF if isinstance(value, int) else value


def _mix(value: Word) -> Word:
    """Finaliser of SplitMix64: every input bit flips every output bit with probability one half."""
    value = _wrap((value ^ ((value >> 30) & ((1 << 34) - 1))) * _MIX_1)
    value = _wrap((value ^ ((value >> 27) & ((1 << 37) - 1))) * _MIX_2)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _hash_name(name: str) -> int:
    """FNV-1a in 32 bits, spelt out so that a compiled model folds it into a constant."""
    state = 0x811C9DC5
    for letter in name:
        state = ((state ^ ord(letter)) * 0x01000193) & 0xFFFFFFFF
    return state


def mix_seed(*parts: int) -> int:
    """Hash integers (say run seed and optimiser step) into one seed in [0, 2^63)."""
    state = 0
    for part in parts:
        state = _mix(_wrap(state * 31 + _wrap(int(part) + 1) * _GOLDEN))
    return state & _POSITIVE


@dataclass(frozen=True)
class Noise:
    """Source of all random numbers of one forward pass.

    Args:
        seed: run seed and optimiser step, mixed (`mix_seed`); an int64 tensor of no dimensions keeps a
            compiled model from specialising on the number.
        row_offset: global index of the first sample of this batch; rows are contiguous from there.
        rows: int64 [R] instead, where the R rows at hand are not samples but parts of some (their images, say).
        tokens: int64, which tokens of the run are at hand (:meth:`parts`), for modules that see no whole rows.
    """

    seed: int | Tensor
    row_offset: int = 0
    rows: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def draw(cls) -> Noise:
        """A seed from torch's default generator, for use outside a trainer.

        A compiled or exported model keeps it a tensor: the number is not known where its graph is made.
        """
        seed = torch.randint(0, _POSITIVE, (), dtype=torch.int64)
        return cls(seed=seed if torch.compiler.is_compiling() else int(seed))

    def site(self, name: str | int) -> int | Tensor:
        """Seed in [0, 2^63) for one place of use; of the same type as ``seed``."""
        key = _hash_name(name) if isinstance(name, str) else int(name)
        offset = _wrap((key + 1) * _GOLDEN)
        if isinstance(self.seed, int):
            return _mix(_wrap(self.seed + offset)) & _POSITIVE
        return _mix(self.seed + offset) & _POSITIVE

    def parts(self, places: Tensor, width: int) -> Tensor:
        """Global numbers int64 of parts of samples (tokens, images), however these are batched.

        Args:
            places: int64 [P] among the batch's rows end to end.
            width: parts of every row.
        """
        return (self.row_offset + places // width) * _LONGEST_ROW + places % width

    def uniform(
        self, site: str | int, rows: int | Tensor, *shape: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Uniform numbers in [0, 1) with 24 random bits, float32 [rows, *shape].

        Row ``i`` depends on the seed, the site and ``row_offset + i`` alone, or on ``rows[i]`` where the rows have
        numbers of their own.
        """
        seed = self.site(site)
        if isinstance(seed, Tensor):
            seed = seed.to(device)
        if isinstance(rows, Tensor):
            row = rows.to(device)
        elif self.rows is not None:
            row = self.rows.to(device)
        else:
            row = torch.arange(self.row_offset, self.row_offset + rows, device=device, dtype=torch.int64)
        count = 1
        for size in shape:
            count *= size
        column = torch.arange(count, device=device, dtype=torch.int64)
        bits = _mix(_mix(row * _GOLDEN + seed)[:, None] + column * _GOLDEN)
        return (((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24).view(len(row), *shape)
