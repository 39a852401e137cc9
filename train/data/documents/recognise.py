"""Which format a source is in: found out, or what the user says held against its first records."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ....models.received import check_regular
from ..names import is_litter
from ..pairs.text_tables import table_suffix
from ..parquet_rows import check_groups
from ..report import BadSample
from .formats import FORMATS, Format
from .formats.format import shown
from .formats.obelics import OBELICS
from .formats.webdataset import WEBDATASET
from .other_files import is_picture_folder
from .record_files import file_kind, read_records
from .sources import open_dataset, saved_dataset

AUTO = "auto"
# Files that are looked into, and records of each.
_FILES, _RECORDS = 8, 8


def choose_format(name: str, source: str) -> Format:
    """The format to read ``source`` in.

    Args:
        name: of :data:`~.formats.FORMATS`, or ``auto``.

    Raises:
        ValueError: there is no such format, the source is in another one, or in none that is known.
        FileNotFoundError: there is no such source.
    """
    if name != AUTO and name not in FORMATS:
        raise ValueError(f"--format {name} given, expected one of {', '.join((AUTO, *FORMATS))}")
    path = Path(source)
    check_regular(path)
    if not path.exists() and not _is_hub_id(source):
        raise FileNotFoundError(
            f"no source at {source}; give a file, a folder of them, a folder written by datasets' save_to_disk, or "
            "a hub id like HuggingFaceM4/OBELICS"
        )
    records = list(_first_records(path, source))
    found = _by_files(path, records) or _by_records(records)
    if name == AUTO:
        if found is None:
            known = "; ".join(f"{made.name} ({made.marks})" for made in FORMATS.values())
            raise ValueError(
                f"{source} is in no format that is known: {_fields(records)}; expected one of {known}, "
                "or give --format"
            )
        return found
    wanted = FORMATS[name]
    if found is wanted or any(wanted.could_be(record) for record in records) or _fits(wanted, path, records):
        return wanted
    if found is not None and (records or wanted is not OBELICS):
        raise ValueError(
            f"{source} is not {name} ({wanted.marks}) but {found.name} ({found.marks}); "
            f"use --format {found.name} or --format {AUTO}"
        )
    if records and wanted is not OBELICS:
        raise ValueError(f"{source} is not {name}: expected {wanted.marks}; {_fields(records)}")
    return wanted


def _fields(records: list[Mapping[str, Any]]) -> str:
    return f"its records have {shown(records[0])}" if records else "no record in it can be read"


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/"))


def _by_files(path: Path, records: list[Mapping[str, Any]]) -> Format | None:
    """What the files' names alone tell."""
    if not path.exists() or saved_dataset(path):
        return None
    if is_picture_folder(path):
        return FORMATS["pairs"]
    names = [file.name.lower() for file in _walk(path)]
    if any(WEBDATASET.kind_of(Path(name)) for name in names):
        return WEBDATASET
    if records:
        return None
    tables = [
        name for name in names if table_suffix(Path(name)) in (".csv", ".tsv", ".tab", ".psv", ".token")
    ]
    if tables:
        return FORMATS["pairs"]
    return FORMATS["text"] if any(FORMATS["text"].kind_of(Path(n)) == "text" for n in names) else None


def _fits(wanted: Format, path: Path, records: list[Mapping[str, Any]]) -> bool:
    """Whether a source without records to look at has files that the format is read from."""
    if records or not path.exists():
        return False
    return any(wanted.kind_of(file) and not file_kind(file) for file in _walk(path))


def _by_records(records: list[Mapping[str, Any]]) -> Format | None:
    """The format that most records are in."""
    votes: Counter[str] = Counter()
    for record in records:
        for made in FORMATS.values():
            if made.recognise(record):
                votes[made.name] += 1
                break
    return FORMATS[votes.most_common(1)[0][0]] if votes else None


def _walk(path: Path) -> Iterator[Path]:
    """The files of a source, in order, those that are nobody's left out."""
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not is_litter(name))
        for name in sorted(names):
            if not is_litter(name):
                yield Path(folder) / name


def _first_records(path: Path, source: str) -> Iterator[Mapping[str, Any]]:
    """A few records, of a few files."""
    if not path.exists() or saved_dataset(path):
        data = open_dataset(source)
        for number in range(min(len(data), _RECORDS)):
            yield dict(data[number])
        return
    files = ((file, file_kind(file)) for file in _walk(path))
    for file, kind in islice(((f, k) for f, k in files if k and f.is_file()), _FILES):
        yield from _parquet(file) if kind == "parquet" else _lines(file, kind)


def _lines(file: Path, kind: str) -> Iterator[Mapping[str, Any]]:
    try:
        for line in read_records(file, kind, 0, _RECORDS):
            try:
                record = json.loads(line or b"")
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record
    except BadSample:
        return


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        check_groups(table.metadata, table.schema_arrow.names, str(file))
        for batch in table.iter_batches(_RECORDS):
            yield from batch.to_pylist()
            return
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, BadSample):
        return


def default_image_root(made: Format, source: str) -> str | None:
    """The folder that a source names its pictures from, where the user gives none: its own.

    Of OBELICS none: its paths, as published, are those of other machines.
    """
    path = Path(source)
    if made is OBELICS or not path.exists():
        return None
    return str(path if path.is_dir() else path.parent)
