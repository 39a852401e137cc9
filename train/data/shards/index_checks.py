"""Whether an index can be one: its header's kinds, its columns' types and sizes, the places it names.

An index may come with data from anybody. Its checksums are its writer's own, so they say nothing about what a reader
would do with an offset of 2⁶² or a column of the wrong type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_HEADER = {
    "kind": str,
    "shard": str,
    "bytes": int,
    "sha256": str,
    "samples": int,
    "tokens": int,
    "images": int,
    "extensions": list,
    "columns_sha256": str,
    "columns_crc32": dict,
    "report": dict,
    "metadata": dict,
}
# NumPy kind and size in bytes of an element, and what the number of rows is counted in.
_COLUMNS = {
    "first_member": ("u4", "samples + 1"),
    "tokens": ("u4", "samples"),
    "images": ("u2", "samples"),
    "key": ("u1", None),
    "key_end": ("u4", "samples"),
    "offset": ("u8", "members"),
    "length": ("u4", "members"),
    "crc32": ("u4", "members"),
    "extension": ("u1", "members"),
}
_MAX_BYTES = 1 << 50


def check_header(header: Any) -> None:
    """Check the header of an index.

    Raises:
        ValueError: an entry is missing, of another kind, or a number that cannot be.
    """
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}")
    for name, kind in _HEADER.items():
        if type(header.get(name)) is not kind:
            raise ValueError(f"its header has no {name} of type {kind.__name__}")
        if kind is int and not 0 <= header[name] < _MAX_BYTES:
            raise ValueError(f"its header says {name}={header[name]}")
    if not all(isinstance(extension, str) for extension in header["extensions"]):
        raise ValueError("its header has an extension that is no text")


def check_column(name: str, values: np.ndarray, header: Mapping[str, Any], members: int) -> None:
    """Check a column against the header.

    Args:
        name: of the column; those a writer adds are not known here.
        values: its rows.
        header: that :func:`check_header` took.
        members: rows that ``offset`` has.

    Raises:
        ValueError: it has another type or number of rows, or values that lead out of the shard or of other columns.
    """
    if name not in _COLUMNS:
        return
    kind, rows = _COLUMNS[name]
    samples = header["samples"]
    wanted = {"samples": samples, "samples + 1": samples + 1, "members": members, None: values.size}[rows]
    if values.dtype != np.dtype(kind) or values.shape != (wanted,):
        raise ValueError(
            f"column {name!r} is {values.dtype} of {list(values.shape)}, expected {np.dtype(kind)} of [{wanted}]"
        )
    if not values.size:
        return
    if name in ("first_member", "key_end") and (values[1:] < values[:-1]).any():
        raise ValueError(f"column {name!r} falls")
    if name == "first_member" and (int(values[0]) != 0 or int(values[-1]) != members):
        raise ValueError(f"column {name!r} does not cover the {members} members")
    if name == "offset" and int(values.max()) > header["bytes"]:
        raise ValueError(f"column {name!r} leads out of the shard's {header['bytes']} bytes")
    if name == "length" and int(values.max()) > header["bytes"]:
        raise ValueError(f"column {name!r} says more than the shard's {header['bytes']} bytes")
    if name == "extension" and int(values.max()) >= len(header["extensions"]):
        raise ValueError(f"column {name!r} names more than {len(header['extensions'])} extensions")
