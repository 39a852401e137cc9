"""A run's folder of checkpoints: names, order, what is sound, and writing one whole or not at all."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..files import check_room, discard, hidden_name, open_atomically, writing
from ..messages import tell
from ..runs import CHECKPOINTS, LATEST
from .sharded import read_sharded
from .sharded_files import SUFFIX, is_complete, shards_damage, tensor_bytes

BEST, LAST = "best", "last"
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


def point_best(path: Path) -> None:
    """Replace the link ``best.ckpt`` (or ``.shards``) beside a checkpoint by one to it, in one step."""
    for link in (path.with_name(f"{BEST}{suffix}") for suffix in (".ckpt", SUFFIX)):
        if link.suffix != path.suffix:
            discard(link)
    link = path.with_name(f"{BEST}{path.suffix}")
    staged = hidden_name(link)
    try:
        staged.symlink_to(path.name)
        os.replace(staged, link)
    finally:
        discard(staged)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``best`` stands for in a folder; None where no score was monitored."""
    for suffix in (".ckpt", SUFFIX):
        link = folder / f"{BEST}{suffix}"
        if link.is_symlink() and is_checkpoint(link):
            return folder / os.readlink(link)
    return None


def named_checkpoint(path: Path) -> Path | None:
    """The checkpoint that ``RUN/best`` or ``RUN/last`` names, ``EXPERIMENT/best`` that of its newest run; else None.

    Raises:
        ValueError: the run has no such checkpoint, or a damaged one.
    """
    if path.name not in (BEST, LAST) or path.exists():
        return None
    parent = path.parent
    folder = next((f for f in (parent / CHECKPOINTS, parent / LATEST / CHECKPOINTS) if f.is_dir()), parent)
    found = best_checkpoint(folder) if path.name == BEST else newest_sound_checkpoint(folder)
    if found is None:
        raise ValueError(
            f"{path}: {parent} has no checkpoint that {path.name} could stand for; give a run directory"
            + (" of a run with callbacks.checkpoint.monitor." if path.name == BEST else ".")
        )
    if path.name == BEST and (problem := damage(found)):
        raise ValueError(f"{path} stands for {found.name}, which is damaged ({problem}); give RUN/last.")
    return found


def remove(path: Path) -> None:
    """Delete a checkpoint; a directory in one rename first, so that no half of it is ever taken for whole."""
    if path.is_dir():
        doomed = hidden_name(path)
        path.rename(doomed)
        path = doomed
    discard(path)
