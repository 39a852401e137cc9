"""What evaluations leave behind besides their scores: predictions as files, and a count of what was left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.report import SkipReport
from ..files import write_atomically
from .ranks import merged, rank_and_count, tell


def write_predictions(folder: str | Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON list into the run directory, on the first rank."""
    if rank_and_count()[0] == 0:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", json.dumps(list(rows), ensure_ascii=False, indent=0) + "\n")


def losses(report: SkipReport, prefix: str) -> dict[str, float]:
    """What all ranks left out: a line on stderr for each reason, and ``PREFIX/skipped`` with the sum."""
    whole = merged(report)
    for line in whole.lines():
        tell(f"left out: {line}")
    return {f"{prefix}/skipped": float(whole.skipped)}


def require_some(answered: int, asked: int, report: SkipReport) -> None:
    """
    Raises:
        ValueError: nothing at all could be evaluated.
    """
    if not answered:
        reasons = "; ".join(merged(report).lines())
        raise ValueError(
            f"none of {asked} samples could be used ({reasons}); check where the pictures lie, images=FOLDER."
        )
