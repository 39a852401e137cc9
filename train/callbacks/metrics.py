"""``metrics.csv``: the record of a run, one row every few steps, continued without duplicates on resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..runs import MetricsTable
from .loggers import guarded


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
        self._found: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        """Put values into the row of this step, which is then written whatever ``log_every`` says."""
        self._found.update(values)

    def amend(self, trainer: Trainer, step: int, values: dict[str, float]) -> None:
        """Add values to the row of a step that may be written already."""
        self.summary.update(values)
        if trainer.is_global_zero and values:
            self.table.amend(step, values)
            guarded(trainer.loggers, lambda logger: logger.log_metrics(values, step=step))

    def paused(self, seconds: float) -> None:
        """Leave out of all speeds a time in which nothing was trained."""
        self._last = self._last[0], self._last[1] + seconds
        if self._begun is not None:
            self._begun = self._begun[0], self._begun[1] + seconds

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
        if step % self.log_every and step != trainer.max_steps and not self._found:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()} | self._found
        self._found = {}
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
            guarded(trainer.loggers, lambda logger: logger.log_metrics(values, step=step))
