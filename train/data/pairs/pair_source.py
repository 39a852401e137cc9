"""What a source of pairs is: a sequence with a cheap length and a digest.

Row i is always the same pair, so shard k can be built from rows ``[k * n, (k + 1) * n)`` by any process at any time,
and an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..report import BadSample, SkipReport


@dataclass(slots=True)
class RawPair:
    """One pair as its source has it; ``nouns`` is the cell of the noun column, if any."""

    name: str
    image: bytes
    captions: list[str]
    nouns: Any = None


class PairSource(Protocol):
    """A sequence of pairs that can be read from any row; ``unused`` notes what lies beside them and is not read."""

    unused: SkipReport

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Changes when the rows do."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        """Pairs of rows ``start`` to ``stop``, or what is wrong with a row."""
        ...

    def pictures_of_rows(self) -> Iterator[Hashable]:
        """What tells the picture of each row from those of others (its path, or of encoded bytes a digest)."""
        ...


class Rows:
    """Some rows of a source, in order: one side of a hold-out split."""

    def __init__(self, source: PairSource, rows: Sequence[int], label: str) -> None:
        self.source, self.numbers, self.label = source, rows, label
        self.unused = source.unused

    def __len__(self) -> int:
        return len(self.numbers)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()}:{self.label}:{len(self)}".encode()).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        wanted = self.numbers[start:stop]
        low = 0
        while low < len(wanted):
            high = low + 1
            while high < len(wanted) and wanted[high] == wanted[high - 1] + 1:
                high += 1
            yield from self.source.rows(wanted[low], wanted[high - 1] + 1)
            low = high

    def pictures_of_rows(self) -> Iterator[Hashable]:
        every = list(self.source.pictures_of_rows())
        return (every[number] for number in self.numbers)


def picture_of(cell: Any) -> Hashable:
    """What tells the picture that a table's cell means from others; a cell that names none is like no other."""
    if isinstance(cell, list | tuple) and len(cell) == 1:
        cell = cell[0]
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes | bytearray | memoryview):
        return hashlib.sha256(cell).digest()
    if isinstance(cell, int):
        return cell
    return posixpath.normpath(cell.strip()) if isinstance(cell, str) and cell.strip() else object()
