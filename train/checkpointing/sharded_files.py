"""The files of a sharded checkpoint: which are there, whether they are whole, and reading their index safely.

A sharded checkpoint is a directory ``step-00000012.shards/`` with what ``torch.distributed.checkpoint`` writes (a file
of tensors from each rank and ``.metadata``, the index), ``state.pt`` (everything that is no large tensor) and, written
last, ``COMPLETE``: JSON with the size and SHA-256 of every other file. It is made under a hidden name and renamed.

The library pickles its index. Here only the record types of an index can come out of that pickle, whatever it says.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ...models.inside import is_inside
from ...models.received import read_settings
from ..files import write_atomically

SUFFIX = ".shards"
MARKER = "COMPLETE"
STATE = "state.pt"
INDEX = ".metadata"
FORMAT = 1
HASHING_THREADS = 8

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """Makes the records of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            # A path in a file is a string to us: no path of this system is made from it.
            return PurePath if module == "pathlib" else super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no index does")


class IndexReader(FileSystemReader):
    """Reads a sharded checkpoint whose index may not be trusted; tensors are loaded with ``weights_only``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_index(folder: Path) -> Metadata:
    """The library's index of a sharded checkpoint.

    Raises:
        ValueError: it is no index of tensors in files of this directory.
    """
    try:
        with open(folder / INDEX, "rb") as file:
            metadata = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise ValueError(f"checkpoint={folder} has no {INDEX}; give a complete sharded checkpoint.") from None
    except Exception as error:  # a damaged pickle raises what it likes
        raise ValueError(f"checkpoint={folder} has an index that cannot be read ({error}).") from error
    entries = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(entries, dict)
        or not isinstance(places, dict)
        or not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values())
        or not all(
            isinstance(getattr(place, "relative_path", None), str)
            and PurePath(place.relative_path).name == place.relative_path
            and not getattr(place, "transform_descriptors", None)
            for place in places.values()
        )
    ):
        raise ValueError(f"checkpoint={folder} has an index of something else than tensors in its own files.")
    return metadata


def is_complete(folder: Path) -> bool:
    """Whether a sharded checkpoint was written to its end."""
    return (folder / MARKER).is_file()


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested mappings and lists; of sharded ones the part of this rank."""
    if isinstance(value, torch.Tensor):
        return (value.to_local() if isinstance(value, DTensor) else value).nbytes
    if isinstance(value, Mapping):
        return sum(tensor_bytes(part) for part in value.values())
    return sum(tensor_bytes(part) for part in value) if isinstance(value, list | tuple) else 0


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_marker(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Declare a directory complete that holds ``files`` (name to :func:`checksum`)."""
    text = json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True)
    write_atomically(folder / MARKER, text)


def shards_damage(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint, or None where every file is as it was written."""
    try:
        marker = read_settings(folder / MARKER)
        if marker["format"] != FORMAT:
            return f"{MARKER} is of format {marker['format']}, this version reads {FORMAT}"
        wanted = {
            str(name): (int(entry["bytes"]), entry["sha256"]) for name, entry in marker["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{MARKER} cannot be read: {type(error).__name__}: {error}"
    if not {INDEX, STATE} <= wanted.keys():
        return f"{MARKER} does not name {INDEX} and {STATE}"
    for name, (size, _) in wanted.items():
        path = folder / name
        if PurePath(name).name != name or not is_inside(folder, name) or not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes, {size} were written"

    def differs(name: str) -> str | None:
        try:
            found = checksum(folder / name)["sha256"]
        except OSError as error:
            return f"its file {name} cannot be read: {error}"
        return None if found == wanted[name][1] else f"the checksum of its file {name} does not hold"

    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing leaves the interpreter free
        return next((problem for problem in pool.map(differs, sorted(wanted)) if problem), None)
