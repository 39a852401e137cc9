"""Checkpoints of which every rank writes its part, readable on any number of ranks and by any strategy.

Weights, their averages and the optimiser's moments go through ``torch.distributed.checkpoint`` under their names
(``weights.<name>``, ``average.<name>``, ``moments.<name>.exp_avg``); it notes which rows of which tensor lie where, so
a reader may cut them otherwise. All else (step, seed, data fingerprint, loss scale, step counts of the optimiser) is
in ``state.pt``, plain values that ``weights_only`` reads. See :mod:`.sharded_files` for the files.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..files import check_room, discard, make_staging, open_atomically, put_in_place, writing
from ..optim.averages import AVERAGE, TENSORS, UPDATES
from ..parallel.ranks import from_rank_zero, gathered, ranks, together
from .sharded_files import INDEX, STATE, IndexReader, checksum, read_index, tensor_bytes, write_marker

WEIGHTS = "weights."
MOMENTS = "moments."
AVERAGES = f"{AVERAGE}."
COUNTS = "optimizer_counts"


def save_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a Lightning checkpoint of which every rank holds its shards, as the directory ``folder``.

    Every rank must call it. The directory appears whole, replacing a damaged one of its name, or not at all.

    Args:
        checkpoint: ``state_dict`` name to tensor, ``optimizer_states`` one state by parameter name, ``average`` where
            one is kept, and plain values, of which those of rank 0 are written.
        folder: on a file system that all ranks see.

    Raises:
        OSError: a rank could not write; raised on every rank.
    """
    rank, world_size = ranks()
    tensors, plain = _split(checkpoint)
    sizes = gathered(tensor_bytes(tensors))

    def prepare() -> Path:
        check_room(folder, sum(sizes))
        return make_staging(folder)

    staged = from_rank_zero(prepare)

    def write_tensors() -> dict[str, Any]:
        # The library itself raises on every rank what one of them meets.
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(staged, sync_files=True))
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{type(reason).__name__}: {reason}") from error
        return {path.name: checksum(path) for path in sorted(staged.glob(f"__{rank}_*"))}

    def finish(files: dict[str, Any]) -> None:
        if rank != 0:
            return
        with writing(folder, sum(sizes)):
            with open_atomically(staged / STATE) as file:
                torch.save(plain, file)
            files |= {name: checksum(staged / name) for name in (STATE, INDEX)}
            write_marker(staged, files)
            put_in_place(staged, folder)

    try:
        own = together(write_tensors)
        everyone: list[dict[str, Any]] = [{}] * world_size
        if world_size > 1:
            dist.all_gather_object(everyone, own)
        else:
            everyone = [own]
        together(lambda: finish({name: entry for part in everyone for name, entry in part.items()}))
    except BaseException:
        if rank == 0:
            discard(staged)
        raise


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    plain = {
        name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")
    }
    tensors = {WEIGHTS + name: value for name, value in checkpoint["state_dict"].items()}
    counts: dict[str, dict[str, float]] = {}
    for state in checkpoint.get("optimizer_states", []):
        for name, entry in state["state"].items():
            for key, value in entry.items():
                if key == "step":
                    counts.setdefault(name, {})[key] = float(value)
                else:
                    tensors[f"{MOMENTS}{name}.{key}"] = value
    if average := checkpoint.get(AVERAGE):
        tensors |= {AVERAGES + name: value for name, value in average[TENSORS].items()}
        plain[AVERAGE] = {UPDATES: average[UPDATES]}
    return tensors, {**plain, COUNTS: counts}


def open_sharded(folder: Path) -> dict[str, Any]:
    """The checkpoint in Lightning's form, its large tensors on the ``meta`` device: :func:`load_tensors` fills them.

    Raises:
        ValueError: it cannot be read as a sharded checkpoint.
    """
    try:
        plain = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        counts = plain.pop(COUNTS)
    except Exception as error:  # torch raises half a dozen kinds, and advises to unpickle what it refused
        raise ValueError(
            f"checkpoint={folder} cannot be read as a sharded checkpoint ({type(error).__name__}); give another one."
        ) from error
    weights: dict[str, Tensor] = {}
    state: dict[str, dict[str, Tensor]] = {
        name: {key: torch.tensor(value) for key, value in entry.items()} for name, entry in counts.items()
    }
    averages: dict[str, Tensor] = {}
    for name, entry in read_index(folder).state_dict_metadata.items():
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # type: ignore[union-attr]
        if name.startswith(WEIGHTS):
            weights[name.removeprefix(WEIGHTS)] = tensor
        elif name.startswith(AVERAGES):
            averages[name.removeprefix(AVERAGES)] = tensor
        elif name.startswith(MOMENTS):
            parameter, _, key = name.removeprefix(MOMENTS).rpartition(".")
            state.setdefault(parameter, {})[key] = tensor
    if AVERAGE in plain:
        plain[AVERAGE][TENSORS] = averages
    return {**plain, "state_dict": weights, "optimizer_states": [{"state": state, "param_groups": []}]}


def load_tensors(tensors: dict[str, Tensor], folder: Path, *, alone: bool) -> None:
    """Fill tensors, whole or shards, with the parts of those of their names (prefix included).

    Args:
        tensors: by the names they were written under.
        folder: the checkpoint.
        alone: read as this process alone; otherwise every rank must call it.

    Raises:
        ValueError: a tensor is not there or has another shape.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=IndexReader(folder), no_dist=alone)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"checkpoint={folder} cannot be read ({reason}).") from error


def read_sharded(folder: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """The whole checkpoint in this process's memory, in Lightning's form; without the moments if so wished."""
    checkpoint = open_sharded(folder)
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    wanted: dict[str, Tensor] = {}
    averages = checkpoint.get(AVERAGE, {}).get(TENSORS, {})
    for prefix, tensors in ((WEIGHTS, checkpoint["state_dict"]), (AVERAGES, averages)):
        for name, tensor in tensors.items():
            wanted[prefix + name] = tensors[name] = _room(tensor, stored, folder)
    (state,) = checkpoint["optimizer_states"]
    if not optimizer:
        state["state"] = {}
    for name, entry in state["state"].items():
        for key, tensor in entry.items():
            if tensor.is_meta:
                wanted[f"{MOMENTS}{name}.{key}"] = entry[key] = _room(tensor, stored, folder)
    load_tensors(wanted, folder, alone=True)
    return checkpoint


def _room(tensor: Tensor, stored: int, folder: Path) -> Tensor:
    """Memory for a tensor of the checkpoint, which has no more bytes than the ``stored`` ones of all files."""
    needed = tensor.numel() * tensor.element_size()
    if needed > stored:
        raise ValueError(
            f"checkpoint={folder} is damaged: its index names a tensor of {needed:,} bytes, its files have {stored:,}."
        )
    return torch.empty_like(tensor, device="cpu")
