"""Checkpoints that are there whole or not at all.

A checkpoint is a file ``step-00000012.ckpt`` or, written by all ranks of a sharded model, a directory
``step-00000012.shards``; any run reads both. It is written to a temporary name in its folder, flushed to the disk and
renamed; only then is an older one removed, and never the one before the newest. One damaged later is found by its
checksums (those of ``torch.save``'s archive, those in a directory's marker), so a resume falls back to the checkpoint
before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..checkpointing.folder import (
    best_checkpoint,
    checkpoint_name,
    checkpoints_newest_first,
    is_checkpoint,
    point_best,
    remove,
)
from ..messages import tell


class NotSavedError(OSError, ValueError):
    """The last checkpoint of a run could not be written: a full disk, mostly, and for the user to mend."""


class CheckpointCallback(Callback):
    """Saves every ``every_steps`` optimiser steps (0: never) and at the end, and keeps the ``keep`` newest.

    A save that fails for want of space, on whatever rank, is reported and tried again at the next interval; the
    checkpoints before it stay. The last save of a run must succeed. ``sharded``: every rank writes its part.
    """

    def __init__(self, folder: Path, *, every_steps: int, keep: int, sharded: bool = False) -> None:
        self.folder = folder
        self.sharded = sharded
        self.every_steps = every_steps
        self.keep = max(2, keep)
        self._saved_step = -1
        # How long each save held up training.
        self.seconds: list[float] = []
        # The step whose checkpoint is the best so far and is to be kept as such, if it is the present one.
        self.wanted: int | None = None
        self._not_kept: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # resumed from there, or nothing to save yet
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                remove(leftover)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        best = self.wanted == trainer.global_step
        if best or (self.every_steps and trainer.global_step % self.every_steps == 0):
            try:
                self.save(trainer)
            except (OSError, RuntimeError) as error:
                if best:
                    self._not_kept()
                if trainer.is_global_zero:
                    self._report(trainer.global_step, error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            self.save(trainer)
        except (OSError, RuntimeError) as error:
            raise NotSavedError(
                f"no checkpoint at step {trainer.global_step}, the last ({error}).{self._intact()} "
                "ckpt_path=last continues."
            ) from error

    def keep_best(self, step: int, not_kept: Callable[[], None]) -> None:
        """Save this step as the best so far; ``not_kept`` is called where that fails."""
        self.wanted, self._not_kept = step, not_kept

    def _report(self, step: int, error: Exception) -> None:
        tell(
            f"WARNING: no checkpoint at step {step} ({error}).{self._intact()} Training goes on and "
            f"tries again in {self.every_steps} steps."
        )

    def _intact(self) -> str:
        newest = next((path.name for _, path in checkpoints_newest_first(self.folder)), None)
        return f" {newest} is intact." if newest else ""

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already. Every rank must call it."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        name = checkpoint_name(step, sharded=self.sharded)
        begun = time.perf_counter()
        trainer.save_checkpoint(self.folder / name, weights_only=False)
        self.seconds.append(time.perf_counter() - begun)
        self._saved_step = step
        if trainer.is_global_zero:
            if self.wanted == step:
                self.point_best(step)
            best = best_checkpoint(self.folder)
            # Those of later steps are of before the run went on from an older one: they do not count.
            kept = [path for saved, path in checkpoints_newest_first(self.folder) if saved <= step]
            for path in kept[self.keep :]:
                if path != best:
                    remove(path)

    def point_best(self, step: int) -> None:
        """Let ``best`` stand for the checkpoint of a step, if that is there."""
        path = self.folder / checkpoint_name(step, sharded=self.sharded)
        if is_checkpoint(path):
            point_best(path)
