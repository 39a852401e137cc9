"""The progress bar: step, loss, samples a second, time left. On a terminal a bar, in a log file a line at times."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..messages import tell

LINE_EVERY_SECONDS = 15.0
REDRAW_EVERY_SECONDS = 0.2


class ProgressCallback(Callback):
    """Shows how the run goes on rank 0; reads the loss at most five times a second, so a GPU is not held up."""

    def __init__(self, *, max_steps: int, global_batch: int) -> None:
        self.max_steps = max_steps
        self.global_batch = global_batch
        self._bar: Any = None
        self._task: Any = None
        self._shown = 0.0
        self._start = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._start = (trainer.global_step, time.perf_counter())
        self._shown = 0.0
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            from ..messages import console as new_console

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=new_console(stderr=True),
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.max_steps, completed=trainer.global_step, state="")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        step = trainer.global_step
        interval = REDRAW_EVERY_SECONDS if self._bar is not None else LINE_EVERY_SECONDS
        if now - self._shown < interval and step < self.max_steps:
            return
        self._shown = now
        state = self._state(step, now, trainer)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=state)
            self._bar.refresh()
        else:
            tell(f"step {step}/{self.max_steps}  {state}")

    def _state(self, step: int, now: float, trainer: Trainer) -> str:
        first, started = self._start
        done = max(step - first, 1)
        seconds = max(now - started, 1e-9)
        left = (self.max_steps - step) * seconds / done
        loss = trainer.callback_metrics.get("train/loss")
        shown = "" if loss is None else f"loss {float(loss):.3f}  "
        return f"{shown}{done * self.global_batch / seconds:,.0f} samples/s  {clock(left)} left"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
