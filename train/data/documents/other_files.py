"""What records lie in besides files of records: tars of samples, text tables, folders of pictures, files of text.

Each kind says how many records of which file make a chunk, and reads a range of them. Tars are scanned by their
headers; whatever is damaged in one is counted once, by the chunk that begins it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ....models.pictures import picture_suffix
from ..names import is_litter
from ..pairs.cells import Columns
from ..pairs.pair_source import RawPair
from ..pairs.sources import open_source
from ..pairs.text_tables import DELIMITED, read_text_table, table_suffix
from ..report import BadSample, SkipReport
from ..shards.index import Entry
from ..shards.scan import refuse_compressed, scan_tar
from ..text import decode_text
from .record_files import MAX_RECORD, file_kind

Read = dict[str, Any] | BadSample
Ranges = Iterator[tuple[int, int, int]]
# Of one sample of a tar, all its members together.
MAX_SAMPLE = 256 * 2**20
# Tables that describe the pictures of a folder, and columns that hold addresses.
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_ADDRESSES = ("url", "image_url", "img_url")


@dataclass(frozen=True)
class OtherKind:
    """How to cut and how to read a kind of file.

    Attributes:
        ranges: (first record, last + 1, 0) of every ``count`` records of a file (path, kind, count).
        read: the records ``start:stop``.
    """

    ranges: Callable[[Path, str, int], Ranges]
    read: Callable[[str, int, int], Iterator[Read]]


def read_other(kind: str, path: str, start: int, stop: int) -> Iterator[Read]:
    """The records ``start:stop`` of a file of one of :data:`OTHER_KINDS`."""
    return OTHER_KINDS[kind].read(path, start, stop)


def _every(count: int, records: int) -> Ranges:
    for start in range(0, records, count):
        yield start, min(records, start + count), 0


def _state(path: str) -> tuple[int, int]:
    """What changes when a file does."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size


def _samples(path: str) -> tuple[list[Entry], dict[str, Any]]:
    return _scanned(path, _state(path))


@lru_cache(maxsize=2)
def _scanned(path: str, _: tuple[int, int]) -> tuple[list[Entry], dict[str, Any]]:
    report = SkipReport()
    entries = scan_tar(path, report=report, checksums=False)[0]
    return entries, report.to_dict()


def _tar_ranges(path: Path, _: str, count: int) -> Ranges:
    refuse_compressed(path)
    return _every(count, len(_samples(str(path))[0]))


def tar_damage(path: str) -> dict[str, Any]:
    """What of a tar is not among its samples, as a report that says it."""
    return {**_samples(path)[1], "seen": 0}


def _read_samples(path: str, start: int, stop: int) -> Iterator[Read]:
    with open(path, "rb") as file:
        for entry in _samples(path)[0][start:stop]:
            if sum(member.length for member in entry.members) > MAX_SAMPLE:
                yield BadSample(f"sample of more than {MAX_SAMPLE >> 20} MiB", entry.key)
                continue
            members = {
                member.extension: os.pread(file.fileno(), member.length, member.offset)
                for member in entry.members
            }
            yield {"members": members}


def _table(path: str) -> list[Read]:
    return _rows(path, _state(path))


@lru_cache(maxsize=2)
def _rows(path: str, _: tuple[int, int]) -> list[Read]:
    """Rows of a text table as records with ``image`` and ``caption``."""
    try:
        found = read_text_table(Path(path), Columns())
    except ValueError as error:
        for name in _ADDRESSES:
            try:
                found = read_text_table(Path(path), Columns(image=name))
                break
            except ValueError:
                continue
        else:
            raise error from None
    return [
        row if isinstance(row, BadSample) else {"image": _one(row[0]), "caption": row[1]}
        for row in found.rows
    ]


def _one(cell: Any) -> Any:
    """The first of the names that a picture may have."""
    return cell[0] if isinstance(cell, tuple) and cell else cell


def _table_ranges(path: Path, _: str, count: int) -> Ranges:
    return _every(count, len(_table(str(path))))


def _read_table(path: str, start: int, stop: int) -> Iterator[Read]:
    yield from _table(path)[start:stop]


def is_picture_folder(path: Path) -> bool:
    """Whether a folder holds pictures, and of files that could be records only what describes them."""
    if not path.is_dir():
        return False
    pictures: set[str] = set()
    others: set[str] = set()
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not is_litter(name)]
        for name in names:
            file = Path(folder) / name
            if is_litter(name) or name in _METADATA:
                continue
            if picture_suffix(name):
                pictures.add(str(file.with_suffix("")))
            elif name.lower().endswith(".tar"):
                return False
            elif file_kind(file) or table_suffix(file) in (*DELIMITED, ".json"):
                others.add(str(file.with_suffix("")))
    return bool(pictures) and others <= pictures


def picture_rows(source: str, report: SkipReport) -> int:
    """How many pictures a folder has; what lies beside them is noted."""
    folder = open_source(source)
    report.merge(folder.unused)
    return len(folder)


def _read_pictures(path: str, start: int, stop: int) -> Iterator[Read]:
    for row in open_source(path).rows(start, stop):
        yield {"image": row.image, "caption": row.captions} if isinstance(row, RawPair) else row


def _one_text(path: Path, _: str, count: int) -> Ranges:
    return _every(count, 1)


def _read_text(path: str, start: int, stop: int) -> Iterator[Read]:
    if os.path.getsize(path) > MAX_RECORD:
        yield BadSample(f"text of more than {MAX_RECORD >> 20} MiB", path)
        return
    try:
        yield {"text": decode_text(Path(path).read_bytes())}
    except UnicodeDecodeError as error:
        yield BadSample("text not UTF-8", path, str(error)[:120])


OTHER_KINDS = {
    "tar": OtherKind(_tar_ranges, _read_samples),
    "table": OtherKind(_table_ranges, _read_table),
    "pictures": OtherKind(lambda path, kind, count: iter(()), _read_pictures),
    "text": OtherKind(_one_text, _read_text),
}
