"""The index beside a shard: where every member lies, what it weighs, and a checksum of everything.

``000017.tar`` has its index in ``000017.idx``: a safetensors file, so columns are memory-mapped and loaded
one by one, nothing in it can execute, and opening it reads the header alone. With N samples and M members:

======================  ========  ======================================================================
column                  shape     meaning
======================  ========  ======================================================================
``first_member`` u32    [N + 1]   members of sample i are ``first_member[i]:first_member[i + 1]``
``tokens`` u32          [N]       length of the sample in tokens (0 where the kind of data has none)
``images`` u16          [N]       number of images
``key`` u8, ``key_end`` [.], [N]  UTF-8 keys end to end, and where each ends
``offset`` u64          [M]       first byte of the member's data in the tar
``length`` u32          [M]       bytes of the member's data
``crc32`` u32           [M]       of the member's data: a flipped byte in a JPEG decodes without complaint
``extension`` u8        [M]       position in the header's list of extensions
others                  [N, …]    whatever the writer adds per sample
======================  ========  ======================================================================

The header (:attr:`ShardIndex.header`) holds the shard's name, size and sha256, the sums of tokens and images,
the digest of the columns, and the report of what could not be indexed. About 100 bytes a document on disk,
of which a plan touches ``tokens`` and ``images``: 6 bytes. Header and columns carry checksums of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_save

from ....models.received import check_regular
from ...files import write_atomically
from ..names import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, JSON_EXTENSIONS, is_image
from ..report import SkipReport
from .index_checks import check_column, check_header

# Only these last suffixes are ever read; everything else in a tar is counted and left alone.
ALLOWED_EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS, *JSON_EXTENSIONS})
INDEX_SUFFIX = ".idx"
_VERSION = 1


def index_path(shard: str | Path) -> str:
    """Path of the index that belongs to a shard: the tar's name with ``.idx`` for ``.tar``."""
    return str(shard).removesuffix(".tar") + INDEX_SUFFIX


@dataclass(slots=True)
class Member:
    """One file inside a tar: its extension (all after the first dot), place, length and checksum."""

    extension: str
    offset: int
    length: int
    crc32: int


@dataclass(slots=True)
class Entry:
    """One sample: its key, its members in tar order, and its counts."""

    key: str
    members: list[Member] = field(default_factory=list)
    tokens: int = 0
    images: int | None = None


class ShardIndex:
    """Lazily read index of one shard; columns load on first use and stay memory-mapped.

    Raises:
        FileNotFoundError: no such index.
        ValueError: the file is not an index, or one of a newer layout.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"no index at {self.path}")
        check_regular(self.path)
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.header: dict[str, Any] = _unseal((self._file.metadata() or {})["interloom"])
            if self.header.get("version") == _VERSION:
                check_header(self.header)
                rows = self._file.get_slice("first_member").get_shape()
                if rows != [self.header["samples"] + 1]:
                    raise ValueError(
                        f"it has {rows} samples and one, its header says {self.header['samples']}"
                    )
            self.num_samples: int = self.header["samples"]
            self.extensions: list[str] = self.header["extensions"]
            self._members = self._file.get_slice("offset").get_shape()[0]
        except (
            SafetensorError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
            ValueError,
            OSError,
        ) as error:
            raise ValueError(
                f"{self.path} is not a readable index ({error}); delete it and run "
                f"`interloom data pairs {os.path.dirname(self.path) or '.'} "
                f"{os.path.dirname(self.path) or '.'} --index-only`"
            ) from None
        if self.header["version"] != _VERSION:
            raise ValueError(f"{self.path} has index layout {self.header['version']}, expected {_VERSION}")
        self._columns: dict[str, np.ndarray] = {}
        self._has_nouns = "nouns_end" in self.header["columns_crc32"]

    def __len__(self) -> int:
        return self.num_samples

    def column(self, name: str) -> np.ndarray:
        """A whole column, loaded and compared with its checksum once.

        Raises:
            ValueError: no such column, or damaged.
        """
        if name not in self._columns:
            try:
                values = self._file.get_tensor(name)
                damaged = _crc32_array(values) != self.header["columns_crc32"][name]
                check_column(name, values, self.header, self._members)
            except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{self.path} has no readable column {name!r} ({error})") from None
            if damaged:
                raise ValueError(f"{self.path} is damaged: column {name!r} differs from its checksum")
            self._columns[name] = values
        return self._columns[name]

    def column_slice(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` of a column, read without loading the rest and unchecked."""
        return self._file.get_slice(name)[start:stop]

    def columns(self) -> list[str]:
        """Names of all columns."""
        return sorted(self._file.keys())

    def key(self, sample: int) -> str:
        """Key of one sample."""
        end = self.column("key_end")
        start = int(end[sample - 1]) if sample else 0
        return bytes(self.column("key")[start : int(end[sample])]).decode("utf-8")

    def members(self, sample: int) -> list[Member]:
        """Members of one sample in tar order."""
        first = self.column("first_member")
        rows = range(int(first[sample]), int(first[sample + 1]))
        extension, offset = self.column("extension"), self.column("offset")
        length, crc = self.column("length"), self.column("crc32")
        return [
            Member(self.extensions[extension[row]], int(offset[row]), int(length[row]), int(crc[row]))
            for row in rows
        ]

    def nouns(self, sample: int) -> list[str] | None:
        """Nouns of one sample where the index was made with them, else None."""
        if not self._has_nouns:
            return None
        end = self.column("nouns_end")
        start = int(end[sample - 1]) if sample else 0
        return json.loads(bytes(self.column("nouns")[start : int(end[sample])]))

    def digest(self) -> str:
        """The columns' digest computed anew; the header's ``columns_sha256`` is what it should be.

        Raises:
            ValueError: a column is damaged.
        """
        return _columns_digest({name: self.column(name) for name in self.columns()})


def _columns_digest(columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        array = np.ascontiguousarray(columns[name])
        digest.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _crc32_array(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data) if array.size else 0


def _seal(header: Mapping[str, Any]) -> str:
    """A header as text with its own checksum in front."""
    text = json.dumps(header, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}{text}"


def _unseal(text: str) -> dict[str, Any]:
    if f"{zlib.crc32(text[8:].encode()):08x}" != text[:8]:
        raise ValueError("its header differs from its checksum")
    return json.loads(text[8:])


def write_index(
    shard: str | Path,
    entries: Sequence[Entry],
    *,
    size: int,
    sha256: str,
    kind: str = "pairs",
    report: SkipReport | None = None,
    metadata: Mapping[str, Any] | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    ragged: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Write the index of ``shard`` atomically and return its path.

    The same entries give the same bytes. ``metadata`` (JSON types) lands in ``header["metadata"]``;
    ``columns`` are extra per-sample arrays [N, …], ``ragged`` ones of any length.

    Raises:
        ValueError: an extra column of the wrong length, or a member of 4 GiB or more.
    """
    members = [member for entry in entries for member in entry.members]
    if any(member.length >= 1 << 32 for member in members):
        raise ValueError(f"{shard}: a member has 4 GiB or more, expected less; split it")
    extensions = sorted({member.extension for member in members})
    if len(extensions) > 256:
        raise ValueError(f"{shard}: {len(extensions)} different extensions, expected at most 256 in a shard")
    code = {extension: i for i, extension in enumerate(extensions)}
    keys = [entry.key.encode() for entry in entries]
    images = [
        entry.images if entry.images is not None else sum(is_image(m.extension) for m in entry.members)
        for entry in entries
    ]
    table: dict[str, np.ndarray] = {
        "first_member": np.cumsum([0, *(len(e.members) for e in entries)], dtype=np.uint32),
        "tokens": np.array([entry.tokens for entry in entries], np.uint32),
        "images": np.array(images, np.uint16),
        "key": np.frombuffer(b"".join(keys), np.uint8),
        "key_end": np.cumsum([len(key) for key in keys], dtype=np.uint32),
        "offset": np.array([m.offset for m in members], np.uint64),
        "length": np.array([m.length for m in members], np.uint32),
        "crc32": np.array([m.crc32 for m in members], np.uint32),
        "extension": np.array([code[m.extension] for m in members], np.uint8),
    }
    for name, values in (columns or {}).items():
        if name in table or len(values) != len(entries):
            raise ValueError(
                f"{shard}: extra column {name!r} has {len(values)} rows, "
                f"expected {len(entries)} and a new name"
            )
        table[name] = np.ascontiguousarray(values)
    table.update({name: np.ascontiguousarray(values) for name, values in (ragged or {}).items()})
    header = {
        "version": _VERSION,
        "kind": kind,
        "shard": Path(shard).name,
        "bytes": size,
        "sha256": sha256,
        "samples": len(entries),
        "tokens": int(table["tokens"].sum()),
        "images": int(table["images"].sum()),
        "extensions": extensions,
        "columns_sha256": _columns_digest(table),
        "columns_crc32": {name: _crc32_array(values) for name, values in sorted(table.items())},
        "report": (report or SkipReport()).to_dict(),
        "metadata": dict(metadata or {}),
    }
    # One metadata key: safetensors writes several in no fixed order, and equal shards shall be equal bytes.
    blob = safetensors_save(table, {"interloom": _seal(header)})
    path = index_path(shard)
    write_atomically(path, blob)
    return path


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
