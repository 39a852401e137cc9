"""Where OBELICS records come from, cut into chunks that workers read independently.

Parquet files, JSON-lines files, folders of them, a saved ``datasets`` folder or a hub id. A chunk
is a range of records of one file; the list of chunks is a function of the source, so a conversion that was
interrupted finds the same chunks again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....models.received import check_regular
from ..report import BadSample


@dataclass(frozen=True)
class Chunk:
    """Records ``start:stop`` of one file or dataset.

    Attributes:
        number: place in the list of all chunks, and name of the shard it becomes.
        kind: ``parquet``, ``jsonl`` or ``datasets``.
        path: file, folder, or hub id.
        start, stop: records; for ``jsonl`` of bytes ``offset`` on.
        offset: where record ``start`` begins in a JSON-lines file.
    """

    number: int
    kind: str
    path: str
    start: int
    stop: int
    offset: int = 0

    def key(self, record: int) -> str:
        """Key of one record: unique, and the same however the source is cut."""
        stem = Path(self.path).name.split(".")[0] or "data"
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)
        return f"{name}-{record:09d}"


def list_chunks(source: str, records_per_chunk: int) -> list[Chunk]:
    """Cut a source into chunks of at most ``records_per_chunk`` records.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a file of an unknown kind, or no records at all.
    """
    path = Path(source)
    check_regular(path)
    found: list[Chunk] = []

    def add(kind: str, name: str, start: int, stop: int, offset: int = 0) -> None:
        found.append(Chunk(len(found), kind, name, start, stop, offset))

    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "state.json").exists()):
        count = len(_dataset(source))
        for start in range(0, count, records_per_chunk):
            add("datasets", source, start, min(count, start + records_per_chunk))
    elif path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if _kind(p))
        if not files:
            raise FileNotFoundError(f"no .parquet or .jsonl file in {path}; give a folder that holds some")
        stems = [file.name.split(".")[0] for file in files]
        for file, stem in zip(files, stems, strict=True):
            if stems.count(stem) > 1:
                raise ValueError(
                    f"two files are called {stem} ({file}); rename one, their keys would collide"
                )
            check_regular(file)
            kind = _kind(file)
            if kind == "parquet":
                import pyarrow.parquet as parquet

                count = parquet.ParquetFile(file).metadata.num_rows
                for start in range(0, count, records_per_chunk):
                    add(kind, str(file), start, min(count, start + records_per_chunk))
            elif kind == "jsonl":
                for start, stop, offset in _line_ranges(file, records_per_chunk):
                    add(kind, str(file), start, stop, offset)
            else:
                raise ValueError(f"{file} is neither .parquet nor .jsonl; convert it to one of them")
    elif "/" in source and not source.startswith((".", "/")) and source.count("/") == 1:
        count = len(_dataset(source))
        for start in range(0, count, records_per_chunk):
            add("datasets", source, start, min(count, start + records_per_chunk))
    else:
        raise FileNotFoundError(
            f"no source at {source}; give a .parquet or .jsonl file, a folder of them, a folder written by "
            "datasets' save_to_disk, or a hub id like HuggingFaceM4/OBELICS"
        )
    if not found:
        raise ValueError(f"{source} holds no records; give a source with at least one")
    return found


def read_chunk(chunk: Chunk) -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
    """Yield (key, record) of a chunk; a line that is no JSON object comes as :class:`BadSample`."""
    if chunk.kind == "jsonl":
        with open(chunk.path, "rb") as stream:
            stream.seek(chunk.offset)
            for number in range(chunk.start, chunk.stop):
                key = chunk.key(number)
                line = stream.readline()
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    yield key, BadSample("line is not a JSON object", key)
                else:
                    yield key, record
    elif chunk.kind == "parquet":
        for number, record in enumerate(_parquet_rows(chunk), chunk.start):
            yield chunk.key(number), record
    else:
        data = _dataset(chunk.path)
        for number in range(chunk.start, chunk.stop):
            yield chunk.key(number), dict(data[number])


def _parquet_rows(chunk: Chunk) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(chunk.path)
    first = 0
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        low, high = max(chunk.start, first), min(chunk.stop, first + count)
        if low < high:
            table = file.read_row_group(group)
            yield from table.slice(low - first, high - low).to_pylist()
        first += count


def _kind(path: Path) -> str:
    return {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(path.suffix, "")


def _line_ranges(path: Path, count: int) -> Iterator[tuple[int, int, int]]:
    """(first line, last line + 1, byte offset of the first) of every ``count`` lines."""
    start = offset = position = number = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            position += len(line)
            if number - start == count:
                yield start, number, offset
                start, offset = number, position
    if number > start:
        yield start, number, offset


def _dataset(source: str) -> Any:
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
        if isinstance(inner, datasets.Image):
            data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return data
