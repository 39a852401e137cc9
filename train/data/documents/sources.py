"""Where records come from, cut into chunks that workers read independently.

Files of records (:mod:`.record_files`: ``.jsonl``, ``.json``, either also compressed; ``.parquet``), folders of them,
a saved ``datasets`` folder or a hub id, and what some formats lie in besides (:mod:`.other_files`: tars, text tables,
folders of pictures, texts). A chunk is a range of records of one file; the list of chunks is a function of the source,
so a conversion that was interrupted finds the same chunks again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ....models.inside import is_inside
from ....models.pictures import picture_suffix
from ....models.received import check_regular
from ..parquet_rows import check_groups, read_rows
from ..report import BadSample, SkipReport
from .formats import FORMATS, Format
from .formats.obelics import OBELICS
from .other_files import OTHER_KINDS, is_picture_folder, picture_rows, read_other
from .record_files import MAX_RECORD, Bomb, file_stem, read_records, record_ranges

PACKED = "with .gz, .bz2, .xz, .zst or .zip"
KINDS = f".parquet, .jsonl or .json (also {PACKED})"
_GROUP_ROWS, _BATCH = 2**20, 16  # the first is what pyarrow writes if nothing is asked for
# What `datasets` leaves in a folder that it saved.
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Chunk:
    """Records ``start:stop`` of one file or dataset.

    Attributes:
        number: place in the list of all chunks, and name of the shard it becomes.
        kind: ``parquet``, ``jsonl``, ``json``, ``datasets`` or one of :data:`~.other_files.OTHER_KINDS`.
        path: file, folder, or hub id.
        start, stop: records.
        offset: where record ``start`` begins in what a JSON file holds.
        stem: what its keys begin with.
        format: name of the :class:`~.formats.Format` of its records.
    """

    number: int
    kind: str
    path: str
    start: int
    stop: int
    offset: int = 0
    stem: str = ""
    format: str = OBELICS.name

    def key(self, record: int) -> str:
        """Key of one record: unique, and the same however the source is cut."""
        return f"{self.stem or _clean(file_stem(Path(self.path).name))}-{record:09d}"


def list_chunks(
    source: str, records_per_chunk: int, report: SkipReport | None = None, made: Format = OBELICS
) -> list[Chunk]:
    """Cut a source into chunks of at most ``records_per_chunk`` records.

    Args:
        report: told of every file that is not read, by reason. Names that begin with a dot, ``__MACOSX``, marks
            of finished jobs (``_SUCCESS``) and pictures, which records name, are no such files.
        made: the format of the records.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a file of an unknown kind, or no records at all.
    """
    path = Path(source)
    report = SkipReport() if report is None else report
    check_regular(path)
    found: list[Chunk] = []

    def add(kind: str, name: str, start: int, stop: int, offset: int = 0, stem: str = "") -> None:
        found.append(Chunk(len(found), kind, name, start, stop, offset, stem, made.name))

    if saved_dataset(path):
        count = len(open_dataset(source))
        for start in range(0, count, records_per_chunk):
            add("datasets", source, start, min(count, start + records_per_chunk))
    elif made.name == "pairs" and is_picture_folder(path):
        count = picture_rows(source, report)
        for start in range(0, count, records_per_chunk):
            add("pictures", source, start, min(count, start + records_per_chunk))
    elif path.exists():
        files = _files(path, report, made)
        for file, stem in zip(files, _stems(path, files), strict=True):
            kind, before = made.kind_of(file), len(found)
            try:
                if kind in OTHER_KINDS:
                    ranges = OTHER_KINDS[kind].ranges
                elif kind == "parquet":
                    ranges = partial(_row_ranges, columns=made.columns)
                else:
                    ranges = record_ranges
                for start, stop, offset in ranges(file, kind, records_per_chunk):
                    add(kind, str(file), start, stop, offset, stem)
            except BadSample as bad:
                if isinstance(bad, Bomb):
                    del found[before:]
                report.add_bad(bad)
    elif "/" in source and not source.startswith((".", "/")) and source.count("/") == 1:
        count = len(open_dataset(source))
        for start in range(0, count, records_per_chunk):
            add("datasets", source, start, min(count, start + records_per_chunk))
    else:
        raise FileNotFoundError(
            f"no source at {source}; give a .parquet or .jsonl file, a folder of them, a folder written by "
            "datasets' save_to_disk, or a hub id like HuggingFaceM4/OBELICS"
        )
    if not found:
        lost = "".join(f"; {line}" for line in report.lines(names=1))
        raise ValueError(f"{source} holds no records{lost}; give a source with at least one")
    return found


def _files(path: Path, report: SkipReport, made: Format) -> list[Path]:
    """The files of records at a path, in order."""
    kinds = "a .tar" if made.name == "webdataset" else KINDS
    if not path.is_dir():
        if not made.kind_of(path):
            raise ValueError(
                f"{path} is neither .parquet nor .jsonl, nor .json (also {PACKED}); convert it to one of them"
                if kinds is KINDS
                else f"{path} is not {kinds}, expected one of {made.marks}"
            )
        return [path]
    files = []

    def unreadable(error: OSError) -> None:
        report.add("folder cannot be read", str(error.filename), error.strerror or "")

    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not _ignored(name))
        for name in list(folders):
            if os.path.islink(os.path.join(folder, name)):
                report.add("linked folder not followed", os.path.join(folder, name))
        for name in sorted(name for name in names if not _ignored(name)):
            file = Path(folder) / name
            if not made.kind_of(file):
                if not picture_suffix(file):
                    report.add(f"file of another kind ({file.suffix or 'no suffix'})", str(file))
            elif not is_inside(path, str(file.relative_to(path))):
                report.add("link out of the folder", str(file))
            elif not file.is_file():
                report.add("not a file", str(file))
            else:
                files.append(file)
    if not files:
        lost = "".join(f"; {line}" for line in report.lines(names=1))
        raise FileNotFoundError(
            f"no {'.tar' if kinds is not KINDS else '.parquet or .jsonl'} file in {path}{lost}; give a folder "
            f"that holds {kinds}"
        )
    return sorted(files)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "_SUCCESS", "_committed", "_started")


def _clean(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name) or "data"


def _stems(root: Path, files: list[Path]) -> list[str]:
    """What the keys of each file begin with: its name, or its path where names repeat."""
    short = [_clean(file_stem(file.name)) for file in files]
    stems: list[str] = []
    for file, name in zip(files, short, strict=True):
        if short.count(name) > 1:
            name = _clean(file_stem(str(file.relative_to(root))))
        stem, number = name, 1
        while stem in stems or (stem != name and stem in short):
            number += 1
            stem = f"{name}-{number}"
        stems.append(stem)
    return stems


def read_chunk(chunk: Chunk) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yield (key, record) of a chunk; a line that is no JSON object comes as :class:`BadSample`."""
    if chunk.kind in ("jsonl", "json"):
        count = chunk.stop - chunk.start
        records = read_records(Path(chunk.path), chunk.kind, chunk.offset, count)
        for number, line in enumerate(records, chunk.start):
            yield chunk.key(number), _json_record(line, chunk.key(number))
    elif chunk.kind == "parquet":
        for number, record in enumerate(_parquet_rows(chunk), chunk.start):
            yield chunk.key(number), record
    elif chunk.kind in OTHER_KINDS:
        for number, record in enumerate(
            read_other(chunk.kind, chunk.path, chunk.start, chunk.stop), chunk.start
        ):
            yield chunk.key(number), record
    else:
        data = open_dataset(chunk.path)
        for number in range(chunk.start, chunk.stop):
            yield chunk.key(number), dict(data[number])


def _json_record(line: bytes | None, key: str) -> dict[str, Any] | BadSample:
    if line is None:
        return BadSample(f"record of more than {MAX_RECORD >> 20} MiB", key)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else BadSample("line is not a JSON object", key)


def _row_ranges(
    path: Path, _: str, count: int, columns: Sequence[str] | None
) -> Iterator[tuple[int, int, int]]:
    """(first row, last row + 1, 0) of every ``count`` rows of a Parquet file.

    Raises:
        BadSample: it is damaged, or a row group is beyond the limits.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        metadata = file.metadata
        check_groups(metadata, _read_columns(file, columns), str(path), _GROUP_ROWS)
    except (OSError, pyarrow.ArrowException) as error:
        raise BadSample("file damaged", str(path), str(error)[:120]) from None
    for start in range(0, metadata.num_rows, count):
        yield start, min(metadata.num_rows, start + count), 0


def _read_columns(file: Any, columns: Sequence[str] | None) -> list[str]:
    return [name for name in file.schema_arrow.names if columns is None or name in columns]


def _parquet_rows(chunk: Chunk) -> Iterator[dict[str, Any] | BadSample]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = chunk.start
    try:
        file = parquet.ParquetFile(chunk.path)
        columns = _read_columns(file, FORMATS[chunk.format].columns)
        for record in read_rows(file, columns, chunk.start, chunk.stop, _BATCH):
            number += 1
            yield record
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        for left in range(number, chunk.stop):
            yield BadSample("row cannot be read", chunk.key(left), f"{type(error).__name__}: {error}"[:120])


def saved_dataset(path: Path) -> bool:
    """Whether ``datasets`` saved the folder."""
    return path.is_dir() and any((path / name).exists() for name in _SAVED)


def open_dataset(source: str) -> Any:
    """A map-style dataset with undecoded images, from disk or from the hub."""
    import datasets

    if os.path.isdir(source):
        data = datasets.load_from_disk(source)
        if isinstance(data, datasets.DatasetDict):
            raise ValueError(
                f"{source} holds splits {', '.join(map(str, data))}; give the folder of one of them"
            )
    else:
        data = datasets.load_dataset(source, split="train")
    for name, feature in data.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return data
