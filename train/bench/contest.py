"""What becomes of the figures of ``kernels.bench.contest.in_turn``: medians, and ratios with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Ours over theirs, round by round: what is busy in a round slows both, so their ratio holds still."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} × ({self.least:.2f} to {self.most:.2f})"


def ratio_of_rounds(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median and spread of the ratios of figures that were taken in the same rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of the figures of every side's rounds the medians; of memory, whose names end in ``_mib``, the largest.

    Figures that are no numbers are left out.
    """
    summary = {}
    for name, rounds in results.items():
        numbers = [key for key, value in rounds[0].items() if isinstance(value, int | float)]
        summary[name] = {
            key: (max if key.endswith("_mib") else statistics.median)(row[key] for row in rounds)
            for key in numbers
        }
    return summary
