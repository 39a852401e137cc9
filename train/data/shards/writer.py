"""Writing shards: plain WebDataset tars whose bytes depend on their samples alone.

A shard is written under a temporary name, synced and renamed; its index follows the same way. So **a shard is
complete exactly when its index exists**, and a build that was killed redoes only the shard it was in.
Member headers carry no time, owner or path of the machine that wrote them: the same samples give the same
bytes, and the sha256 in the index means something.

    with ShardFile("out/000000.tar") as shard:                 # one shard, e.g. in a process pool
        shard.add("a", {"jpg": data, "txt": b"a red square"})

    with ShardWriter("out", samples_per_shard=5000) as writer:  # numbered shards one after the other
        for key, members in samples: writer.add(key, members)
    write_manifest("out")                                       # list of shards: remote folders need it
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...files import StagedFile, discard, hidden_name, sweep, sync_path, write_atomically, writing
from ..names import name_problem
from ..report import SkipReport
from .index import ALLOWED_EXTENSIONS, Entry, Member, ShardIndex, file_sha256, index_path, write_index

MANIFEST = "manifest.json"
_RECORD = tarfile.RECORDSIZE


class ShardFile:
    """One shard in the making; leaving the ``with`` block without an exception publishes it and its index.

    Args:
        path: where the tar will appear; its folder is made.
        kind: ``pairs`` or ``documents``; readers check it.
        allowed: last suffixes that members may have.
        metadata: JSON types for the index header (the tokenizer's digest, the source …).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str = "pairs",
        allowed: frozenset[str] = ALLOWED_EXTENSIONS,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".tar":
            raise ValueError(f"shard name {self.path.name!r} given, expected one that ends in .tar")
        self.kind, self.allowed, self.metadata = kind, allowed, dict(metadata or {})
        self.report = SkipReport()
        self.entries: list[Entry] = []
        self._columns: list[dict[str, Any]] = []
        self._ragged: dict[str, list[int]] = {}
        self._keys: set[str] = set()
        self._position = 0
        self._digest = hashlib.sha256()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = StagedFile(hidden_name(self.path))

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._position

    def _write(self, data: bytes | memoryview) -> None:
        with writing(self.path, self._position + len(data)):
            self._file.write(data)
        self._digest.update(data)
        self._position += len(data)

    def add(
        self,
        key: str,
        members: Mapping[str, bytes],
        *,
        tokens: int = 0,
        images: int | None = None,
        ragged: Mapping[str, Sequence[int]] | None = None,
        **columns: Any,
    ) -> None:
        """Append one sample.

        Args:
            key: name without dots in its last part, unique in the shard.
            members: extension (``jpg``, ``txt``, ``0.jpg`` …) to data, written in this order.
            tokens: length of the sample in tokens.
            images: number of images; counted from the extensions by default.
            ragged: extra columns of any number of values a sample (token positions of its images …), stored
                end to end as u32; the count per sample must follow from another column.
            columns: extra per-sample numbers for the index; the same names for every sample of a shard.

        Raises:
            ValueError: key or extension not usable.
        """
        if not key or "." in key.rpartition("/")[2] or name_problem(key):
            raise ValueError(f"sample key {key!r} given, expected printable characters without a dot")
        if key in self._keys:
            raise ValueError(f"sample key {key!r} is already in {self.path.name}, expected each once")
        for extension in members:
            if extension.rpartition(".")[2] not in self.allowed:
                raise ValueError(
                    f"member {key}.{extension} given, expected one of {', '.join(sorted(self.allowed))}"
                )
        entry = Entry(key, tokens=tokens, images=images)
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(data), 0o644
            self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
            entry.members.append(Member(extension, self._position, len(data), zlib.crc32(data)))
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        self._keys.add(key)
        self.entries.append(entry)
        self._columns.append(columns)
        for name, values in (ragged or {}).items():
            self._ragged.setdefault(name, []).extend(values)

    def close(self) -> str:
        """Publish tar and index; returns the tar's path."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self._position + end) % _RECORD))
        try:
            with writing(self.path, self._position):
                self._file.finish()
        except ValueError:
            self.abort()
            raise
        names = set(self._columns[0]) if self._columns else set()
        if any(set(row) != names for row in self._columns):
            self.abort()
            raise ValueError(
                f"{self.path.name}: samples have different extra columns, expected the same for all"
            )
        # An old index must never sit beside a new tar.
        Path(index_path(self.path)).unlink(missing_ok=True)
        os.replace(self._file.path, self.path)
        sync_path(self.path.parent)
        self.report.seen = max(self.report.seen, len(self.entries) + self.report.skipped)
        try:
            write_index(
                self.path,
                self.entries,
                size=self._position,
                sha256=self._digest.hexdigest(),
                kind=self.kind,
                report=self.report,
                metadata=self.metadata,
                columns={name: np.asarray([row[name] for row in self._columns]) for name in sorted(names)},
                ragged={name: np.array(values, np.uint32) for name, values in sorted(self._ragged.items())},
            )
        except BaseException:
            discard(self.path)  # a tar without its index is no shard
            raise
        return str(self.path)

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        discard(self._file.path)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class ShardWriter:
    """Numbered shards ``000000.tar``, ``000001.tar`` … of bounded count and size, one after the other."""

    def __init__(
        self,
        directory: str | Path,
        *,
        samples_per_shard: int = 5000,
        max_bytes: int = 1 << 30,
        kind: str = "pairs",
        allowed: frozenset[str] = ALLOWED_EXTENSIONS,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} given, expected at least 1")
        self.directory, self.samples_per_shard, self.max_bytes = Path(directory), samples_per_shard, max_bytes
        self._options = {"kind": kind, "allowed": allowed, "metadata": metadata}
        self._shard: ShardFile | None = None
        sweep(self.directory)
        self.paths: list[str] = []

    def add(self, key: str, members: Mapping[str, bytes], **counts: Any) -> None:
        """Append one sample; arguments as in :meth:`ShardFile.add`."""
        shard = self._shard
        if shard and (len(shard.entries) >= self.samples_per_shard or shard.size >= self.max_bytes):
            self._finish()
        if self._shard is None:
            self._shard = ShardFile(self.directory / f"{len(self.paths):06d}.tar", **self._options)
        self._shard.add(key, members, **counts)

    def _finish(self) -> None:
        if self._shard is not None:
            self.paths.append(self._shard.close())
            self._shard = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
            write_manifest(self.directory)
        elif self._shard is not None:
            self._shard.abort()


def write_if_changed(path: Path, data: bytes) -> None:
    """Write a file atomically unless it says that already: a folder that is done may be read-only."""
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)


def write_manifest(directory: str | Path) -> str:
    """Write ``manifest.json``, the list of a folder's complete shards, and return its path.

    Local folders are listed anyway; there the manifest tells when a shard has gone. Remote ones are read
    through it.
    """
    directory = Path(directory)
    shards = []
    for path in sorted(directory.glob("*.tar")):
        if os.path.exists(index_path(path)):
            header = ShardIndex(index_path(path)).header
            entry = {k: header[k] for k in ("shard", "samples", "bytes", "sha256", "tokens", "images")}
            shards.append({**entry, "index_sha256": file_sha256(index_path(path))})
    target = directory / MANIFEST
    write_if_changed(target, (json.dumps({"version": 1, "shards": shards}, indent=1) + "\n").encode())
    return str(target)
