"""Checkpoints that are there whole or not at all.

A checkpoint is a file ``step-00000012.ckpt`` or, written by all ranks of a sharded model, a directory
``step-00000012.shards``; any run reads both. It is written to a temporary name in its folder, flushed to the disk and
renamed; only then is an older one removed, and never the one before the newest. One damaged later is found by its
checksums (those of ``torch.save``'s archive, those in a directory's marker), so a resume falls back to the checkpoint
before it.
"""

from __future__ import annotations

import re
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..files import check_room, discard, hidden_name, open_atomically, writing
from ..messages import tell
from ..sharded_checkpoint import read_sharded
from ..sharded_files import SUFFIX, is_complete, shards_damage, tensor_bytes

PATTERN = re.compile(r"step-(\d+)\.(ckpt|shards)")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint file beside its final name, syncs it, then renames it; reads files and directories."""

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_sharded(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        needed = tensor_bytes(checkpoint)
        with writing(target, needed):
            target.parent.mkdir(parents=True, exist_ok=True)
        check_room(target, needed)
        with open_atomically(target, needed=needed) as file:
            torch.save(checkpoint, file)


def checkpoint_name(step: int, *, sharded: bool = False) -> str:
    """Name of the checkpoint taken after ``step`` optimiser steps: of a file, or of a directory."""
    return f"step-{step:08d}{SUFFIX if sharded else '.ckpt'}"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint itself, not a folder of some."""
    return path.is_file() or (path.is_dir() and is_complete(path))


def checkpoints_newest_first(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in a folder that was written to its end, newest first."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := PATTERN.fullmatch(path.name)) and is_checkpoint(path)
    ]
    return sorted(found, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every checksum in it holds and PyTorch can read it."""
    if path.is_dir():
        return shards_damage(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            # The archive's directory has no checksum; the two readers do not trust the same parts of it.
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        Exception
    ) as error:  # flipped bits can look like encryption, compression, anything: all of it is damage
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    return f"the checksum of its member {broken} does not hold" if broken else None


def newest_sound_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint without damage; each damaged one passed over is reported on stderr."""
    for _, path in checkpoints_newest_first(folder):
        problem = damage(path)
        if problem is None:
            return path
        tell(f"WARNING: checkpoint {path} is damaged ({problem}); falling back to the one before it.")
    return None


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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # resumed from there, or nothing to save yet
        if trainer.is_global_zero and self.folder.is_dir():
            for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it saved
                remove(leftover)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_steps and trainer.global_step % self.every_steps == 0:
            try:
                self.save(trainer)
            except (OSError, RuntimeError) as error:
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
            for _, path in checkpoints_newest_first(self.folder)[self.keep :]:
                remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint; a directory in one rename first, so that no half of it is ever taken for whole."""
    if path.is_dir():
        doomed = hidden_name(path)
        path.rename(doomed)
        path = doomed
    discard(path)
