"""Run directories: ``runs/<experiment>/<run_id>/`` and the ``latest`` link beside them.

A directory holds ``checkpoints/``, ``metrics.json`` (flat, name to number), ``metrics.csv``, ``config.yaml``,
``environment.json`` and ``model/``. Every file is there whole or not at all (:mod:`.files`).
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import platform
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..models.received import read_json
from .files import discard, hidden_name, sweep, write_atomically, writing
from .messages import show, tell, without_secrets
from .parallel.launch import scheduled_run_id

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LATEST = "latest"
METRICS = "metrics.json"
METRICS_TABLE = "metrics.csv"
MODEL = "model"
SKIPPED_STEPS = "skipped_steps.jsonl"


def new_run_id() -> str:
    """Name a run: ``INTERLOOM_RUN_ID`` where set, a SLURM job's number in a job step, else time and chance."""
    given = os.environ.get("INTERLOOM_RUN_ID")
    if given:
        if given in {".", "..", LATEST} or "/" in given:
            raise ValueError(
                f"INTERLOOM_RUN_ID={given!r} cannot name a folder; use letters, digits, '-' and '_'."
            )
        return given
    if scheduled := scheduled_run_id():
        return scheduled
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def create_run(
    root: Path,
    run_id: str,
    *,
    checkpoints: bool = True,
    latest: bool = True,
    claim: Callable[[], None] = lambda: None,
) -> Path:
    """Make ``root/run_id``, with a folder for checkpoints where it trains, and point ``root/latest`` to it.

    ``claim`` is called once the directory exists and before anything else is done in it.

    Raises:
        NotWrittenError: nothing can be written there.
    """
    run_dir = root / run_id
    with writing(run_dir):
        (run_dir / CHECKPOINTS if checkpoints else run_dir).mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(run_dir))
    claim()
    for folder in (root, run_dir):
        sweep(folder)
    if latest:
        point_latest(root, run_id)
    return run_dir


def point_latest(root: Path, run_id: str) -> None:
    """Replace the symlink ``root/latest`` in one step; a real folder of that name is left alone."""
    link = root / LATEST
    if link.exists() and not link.is_symlink():
        return
    staged = hidden_name(link)
    try:
        staged.symlink_to(run_id, target_is_directory=True)
        os.replace(staged, link)
    finally:
        discard(staged)


def runs_newest_first(root: Path) -> list[Path]:
    """The run directories of an experiment, the one started (or continued) last first."""
    if not root.is_dir():
        return []
    runs = [
        path for path in root.iterdir() if path.is_dir() and not path.is_symlink() and path.name[:1] != "."
    ]
    return sorted(runs, key=lambda run: (_started(run), run.name), reverse=True)


def _started(run_dir: Path) -> int:
    """When the run was last started: ``config.yaml`` is written then and at no other time."""
    config = run_dir / CONFIG
    return (config if config.exists() else run_dir).stat().st_mtime_ns


def write_metrics(run_dir: Path, metrics: Mapping[str, float]) -> Path:
    """Write ``metrics.json``, flat and sorted; names already there are kept unless given again.

    A number that is not finite becomes null, which JSON can hold.
    """
    path = run_dir / METRICS
    known: dict[str, Any] = read_metrics(run_dir) if path.exists() else {}
    known.update({name: _json_number(value) for name, value in metrics.items()})
    write_atomically(path, json.dumps(known, indent=2, sort_keys=True) + "\n")
    return path


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Read ``metrics.json`` of a run directory."""
    values = read_json(run_dir / METRICS)
    if not isinstance(values, dict):
        raise ValueError(f"{run_dir / METRICS} does not hold a JSON object; remove it and evaluate again.")
    return values


def write_environment(run_dir: Path, overrides: Sequence[str]) -> None:
    """Write ``environment.json``: what the run ran on and with, for whoever must repeat it."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    values = {
        "arguments": [without_secrets(argument) for argument in sys.argv],
        "overrides": [without_secrets(override) for override in overrides],
        "interloom": product_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    for package in ("triton", "lightning", "numpy", "hydra-core", "kornia"):
        values[package] = _version(package)
    write_atomically(run_dir / ENVIRONMENT, json.dumps(values, indent=2) + "\n")


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _json_number(value: Any) -> float | int | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def show_scores(run_dir: Path) -> None:
    """Print the scores of a run as a small table and say where they are."""

    metrics: dict[str, Any] = read_metrics(run_dir)
    width = max((len(name) for name in metrics), default=0)
    for name, value in metrics.items():
        shown = "–" if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
        show(f"  {name:<{width}}  {shown:>10}")
    show(f"run directory: {run_dir}")


def product_version() -> str:
    """The installed version of Interloom."""
    try:
        return version("interloom")
    except PackageNotFoundError:
        return "0 (not installed)"


class MetricsTable:
    """A CSV file whose first column is ``step``. A new name makes the table anew with one column more.

    Rows that find the disk full wait in memory and are written with the next that finds room.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[dict[str, Any]] = []
        self.columns: list[str] = ["step"]

    def open(self, step: int) -> None:
        """Begin, keeping the whole rows up to ``step``: later ones are about to be written again."""
        rows = [row for row in self.rows() if float(row["step"]) <= step]
        self.columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        self._rewrite(rows)

    def rows(self) -> list[dict[str, str]]:
        """The rows written to their end, by column name; empty cells are left out."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed process may leave half a line
        found = csv.DictReader(io.StringIO(whole))
        return [
            {name: cell for name, cell in row.items() if name and cell} for row in found if row.get("step")
        ]

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write one row; it is in the file when this returns, unless the disk is full."""
        full = bool(self._waiting)
        self._waiting.append({"step": step, **{name: repr(float(value)) for name, value in values.items()}})
        try:
            self._write(self._waiting)
        except OSError as error:
            if not full:
                tell(f"WARNING: {self.path} cannot be written ({error}); free some space.")
            return
        self._waiting = []

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Add values to the row of a step, or a row where there is none."""
        rows = self.rows()
        row = next((row for row in rows if float(row["step"]) == step), None)
        if row is None:
            self.append(step, values)
            return
        row |= {name: repr(float(value)) for name, value in values.items()}
        self.columns = list(dict.fromkeys([*self.columns, *values]))
        self._rewrite(rows)

    def _write(self, new: list[dict[str, Any]]) -> None:
        columns = list(dict.fromkeys([*self.columns, *(name for row in new for name in row)]))
        if columns != self.columns:
            rows = self.rows()
            before, self.columns = self.columns, columns
            try:
                self._rewrite([*rows, *new])
            except OSError:
                self.columns = before
                raise
            return
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(new)
        # Unbuffered, so that nothing is left to be written when the file is closed.
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            line = text.getvalue().encode()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())
