"""Checkpoints that are there whole or not at all.

A checkpoint is written to a temporary name in its folder, flushed to the disk and renamed; only then is an
older one removed, and never the one before the newest. A file damaged later is found by the checksums that
``torch.save`` puts into its archive, so a resume falls back to the checkpoint before it.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

PATTERN = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, syncs it, then renames it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(staged, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_name(step: int) -> str:
    """File name of the checkpoint taken after ``step`` optimiser steps."""
    return f"step-{step:08d}.ckpt"


def checkpoints_newest_first(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in a folder that was written to its end, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := PATTERN.fullmatch(path.name))]
    return sorted(found, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None where every checksum in it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return f"the checksum of its member {broken} does not hold" if broken else None


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint without damage; each damaged one passed over is reported on stderr."""
    for _, path in checkpoints_newest_first(folder):
        problem = damage(path)
        if problem is None:
            return path
        print(
            f"WARNING: checkpoint {path} is damaged ({problem}); falling back to the one before it.",
            file=sys.stderr,
            flush=True,
        )
    return None


class CheckpointCallback(Callback):
    """Saves every ``every_steps`` optimiser steps (0: never) and at the end, and keeps the ``keep`` newest.

    A save that fails for want of space is reported and tried again at the next interval; the checkpoints
    before it stay. The last save of a run must succeed.
    """

    def __init__(self, folder: Path, *, every_steps: int, keep: int) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self.keep = max(2, keep)
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # resumed from there, or nothing to save yet
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                leftover.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_steps and trainer.global_step % self.every_steps == 0:
            try:
                self.save(trainer)
            except (OSError, RuntimeError) as error:
                print(
                    f"WARNING: no checkpoint at step {trainer.global_step} ({error}); free some space. Training "
                    f"goes on and tries again in {self.every_steps} steps.",
                    file=sys.stderr,
                    flush=True,
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already. Every rank must call it."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)
        self._saved_step = step
        if trainer.is_global_zero:
            for _, path in checkpoints_newest_first(self.folder)[self.keep :]:
                path.unlink(missing_ok=True)
