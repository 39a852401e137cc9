"""``metrics.csv``: the record of a run, one row every few steps, continued without duplicates on resume."""

from __future__ import annotations

import csv
import errno
import io
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..files import write_atomically
from ..messages import tell


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


class MetricsCallback(Callback):
    """Every ``log_every`` steps: the module's metrics, its rate and its speed to ``metrics.csv`` and loggers.

    ``summary`` holds the last row afterwards, and the mean speed over the run without its first step.
    """

    def __init__(self, path: Path, *, log_every: int, global_batch: int) -> None:
        self.table = MetricsTable(path)
        self.log_every = log_every
        self.global_batch = global_batch
        self.summary: dict[str, float] = {}
        self._begun: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.table.open(trainer.global_step)
        self._last = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, now = trainer.global_step, time.perf_counter()
        if self._begun is None:
            self._begun = (step, now)
        if step % self.log_every and step != trainer.max_steps:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        before, then = self._last
        if step > before:
            values["train/samples_per_second"] = (step - before) * self.global_batch / max(now - then, 1e-9)
        self._last = (step, now)
        self.summary.update(values)
        first, started = self._begun
        if step > first:
            self.summary["train/samples_per_second"] = (
                (step - first) * self.global_batch / max(now - started, 1e-9)
            )
        if trainer.is_global_zero:
            self.table.append(step, values)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)
