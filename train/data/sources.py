"""Where pairs come from before they are shards: folders, tables and ``datasets`` data sets.

A source is a sequence with a cheap length and a digest: row i is always the same pair, so shard k can be
built from rows ``[k * n, (k + 1) * n)`` by any process at any time, and an interrupted build goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .index import IMAGE_EXTENSIONS
from .report import BadSample

IMAGE_COLUMNS = (
    "image",
    "jpg",
    "png",
    "img",
    "image_path",
    "filepath",
    "file_name",
    "filename",
    "path",
    "file",
)
CAPTION_COLUMNS = (
    "caption",
    "text",
    "txt",
    "captions",
    "title",
    "alt_text",
    "sentence",
    "sentences",
    "label",
)
_TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(slots=True)
class RawPair:
    """One pair as its source has it; ``nouns`` is the cell of the noun column, if any."""

    name: str
    image: bytes
    caption: str
    nouns: Any = None


class PairSource(Protocol):
    """A sequence of pairs that can be read from any row."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Changes when the rows do."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        """Pairs of rows ``start`` to ``stop``, or what is wrong with a row."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of columns; None takes the first usual name that the table has."""

    image: str | None = None
    caption: str | None = None
    nouns: str | None = None

    def resolve(self, names: Sequence[str], source: str) -> tuple[str, str, str | None]:
        """(image, caption, nouns) column of a table with these columns.

        Raises:
            ValueError: a column is not there.
        """
        chosen = []
        for flag, given, usual in (
            ("image", self.image, IMAGE_COLUMNS),
            ("caption", self.caption, CAPTION_COLUMNS),
            ("nouns", self.nouns, ()),
        ):
            found = given if given in names else next((name for name in usual if name in names), None)
            if (given and given not in names) or (found is None and usual):
                what = f"no column {given!r}" if given else f"no {flag} column"
                raise ValueError(
                    f"{source} has {what}, its columns are {', '.join(names)}; name one with --{flag}-column"
                )
            chosen.append(found)
        return chosen[0], chosen[1], chosen[2]


class FolderSource:
    """Images under a folder, in order of their paths.

    Args:
        root: searched recursively, links to folders not followed.
        captions: ``sidecar`` (``a.txt`` beside ``a.jpg``), ``names`` (file and folder names), or ``auto``:
            the sidecar where there is one, else the names.

    Raises:
        ValueError: no images, or unknown ``captions``.
    """

    def __init__(self, root: str | Path, captions: str = "auto") -> None:
        if captions not in ("auto", "sidecar", "names"):
            raise ValueError(f"--captions {captions} given, expected auto, sidecar or names")
        self.root, self.captions = Path(root), captions
        self.paths: list[str] = []
        for folder, folders, files in os.walk(self.root):
            folders.sort()
            inside = os.path.relpath(folder, self.root)
            for name in sorted(files):
                if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                    self.paths.append(os.path.normpath(os.path.join(inside, name)))
        if not self.paths:
            raise ValueError(f"{root} holds no image, expected files ending in {', '.join(IMAGE_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Of the paths and how captions are made."""
        return hashlib.sha256("\n".join([self.captions, *self.paths]).encode("utf-8", "replace")).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        for path in self.paths[start:stop]:
            try:
                image = (self.root / path).read_bytes()
                yield RawPair(path, image, self._caption(path))
            except BadSample as bad:
                yield bad
            except OSError as error:
                yield BadSample("unreadable file", path, str(error.strerror))

    def _caption(self, path: str) -> str:
        if self.captions != "names":
            try:
                return (self.root / path).with_suffix(".txt").read_text(encoding="utf-8")
            except FileNotFoundError:
                if self.captions == "sidecar":
                    raise BadSample("no caption file", path) from None
            except UnicodeDecodeError:
                raise BadSample("text not UTF-8", path) from None
        return caption_from_path(path)


def caption_from_path(path: str) -> str:
    """``animals/birds/red_parrot_01.png`` as ``red parrot, birds, animals``."""
    parts = [os.path.splitext(part)[0] for part in Path(path).parts if part not in (".", "..", "/")]
    words = [" ".join(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", part)) for part in reversed(parts)]
    return ", ".join(dict.fromkeys(filter(None, words)))


class TableSource:
    """CSV, TSV, JSON lines or Parquet (a file, or a folder of Parquet files).

    The image column holds paths (relative to the table) or the encoded bytes. Parquet is read by row group,
    the others are held in memory.

    Raises:
        ValueError: not a readable table, or without the columns.
    """

    def __init__(self, path: str | Path, columns: Columns) -> None:
        self.path = Path(path)
        files = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
        self.base = self.path if self.path.is_dir() else self.path.parent
        self.files = [str(file) for file in files]
        self._table: Any = None
        try:
            if self.kind == "parquet":
                import pyarrow.parquet as parquet

                metadata = [parquet.ParquetFile(file).metadata for file in self.files]
                names = list(parquet.ParquetFile(self.files[0]).schema_arrow.names)
                self.ends, total = [], 0
                for one in metadata:
                    total += one.num_rows
                    self.ends.append(total)
            else:
                table = self._read_text()
                names, self.ends = list(table.column_names), [table.num_rows]
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            raise ValueError(f"{path} is not a readable {self.kind} table ({str(error)[:200]})") from None
        self.columns = columns.resolve(names, str(path))

    @property
    def kind(self) -> str:
        """``parquet``, ``csv`` or ``json``."""
        return "parquet" if self.path.is_dir() else _TABLES[self.path.suffix.lower()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def __len__(self) -> int:
        return self.ends[-1]

    def digest(self) -> str:
        """Of the files' names, sizes and times, and the columns."""
        parts = [f"{f}:{os.path.getsize(f)}:{os.stat(f).st_mtime_ns}" for f in self.files]
        return hashlib.sha256("\n".join([*parts, repr(self.columns)]).encode()).hexdigest()

    def _read_text(self) -> Any:
        if self._table is None:
            if self.kind == "csv":
                from pyarrow import csv

                separator = "\t" if self.path.suffix.lower() == ".tsv" else ","
                options = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
                self._table = csv.read_csv(self.path, parse_options=options)
            else:
                from pyarrow import json

                self._table = json.read_json(self.path)
        return self._table

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        row = start
        while row < stop:
            file = bisect_right(self.ends, row)
            first = self.ends[file - 1] if file else 0
            last = min(stop, self.ends[file])
            for cells in self._cells(file, row - first, last - first):
                yield _pair(cells, self.columns, f"row {row}", self.base)
                row += 1

    def _cells(self, file: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        wanted = [name for name in self.columns if name]
        if self.kind != "parquet":
            yield from self._read_text().select(wanted).slice(start, stop - start).to_pylist()
            return
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.files[file]) as table:
            first = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                low, high = max(start, first), min(stop, first + rows)
                if low < high:
                    cells = table.read_row_group(group, columns=wanted)
                    yield from cells.slice(low - first, high - low).to_pylist()
                first += rows


class DatasetSource:
    """A ``datasets`` data set: a ``save_to_disk`` folder or a hub id.

    Raises:
        ValueError: cannot be loaded, or without the columns or split.
    """

    def __init__(self, source: str, columns: Columns, split: str = "train") -> None:
        import datasets

        try:
            if os.path.isdir(source):
                loaded = datasets.load_from_disk(source)
            else:
                loaded = datasets.load_dataset(source, split=split)
            if isinstance(loaded, dict):
                if split not in loaded:
                    raise ValueError(f"no split {split!r}, expected one of {', '.join(map(str, loaded))}")
                loaded = loaded[split]
        except Exception as error:  # the library raises its own, the hub's and the network's errors
            raise ValueError(
                f"cannot load {source!r} with the datasets library: {str(error)[:300]}"
            ) from None
        self.data: Any = loaded
        self.columns = columns.resolve(self.data.column_names, source)
        for name, feature in self.data.features.items():
            if isinstance(feature, datasets.Image):
                self.data = self.data.cast_column(name, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def digest(self) -> str:
        """The library's fingerprint of the data, and the columns."""
        return hashlib.sha256(f"{self.data._fingerprint}{self.columns}".encode()).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        wanted = self.data.select_columns([name for name in self.columns if name])
        for row in range(start, stop):
            yield _pair(wanted[row], self.columns, f"row {row}", Path("."))


def _pair(
    cells: dict[str, Any], columns: tuple[str, str, str | None], name: str, base: Path
) -> RawPair | BadSample:
    """A pair from one row of a table; images are bytes, ``{bytes, path}`` or a path below ``base``."""
    image, caption = cells.get(columns[0]), cells.get(columns[1])
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        if "://" in image:
            return BadSample("image is a URL", name, "fetch it first")
        name = f"{name} {image}"
        try:
            image = (base / image).read_bytes()
        except OSError as error:
            return BadSample("unreadable file", name, str(error.strerror))
        except ValueError as error:
            return BadSample("unreadable file", name, str(error))
    if not isinstance(image, bytes | bytearray):
        return BadSample("no image", name)
    if isinstance(caption, list):
        caption = caption[0] if caption else None
    nouns = cells.get(columns[2]) if columns[2] else None
    return RawPair(name, bytes(image), "" if caption is None else str(caption), nouns)


class Rows:
    """Some rows of a source, in order: one side of a hold-out split."""

    def __init__(self, source: PairSource, rows: Sequence[int], label: str) -> None:
        self.source, self.numbers, self.label = source, rows, label

    def __len__(self) -> int:
        return len(self.numbers)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()}:{self.label}:{len(self)}".encode()).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        wanted = self.numbers[start:stop]
        low = 0
        while low < len(wanted):
            high = low + 1
            while high < len(wanted) and wanted[high] == wanted[high - 1] + 1:
                high += 1
            yield from self.source.rows(wanted[low], wanted[high - 1] + 1)
            low = high


def open_source(
    source: str, *, captions: str = "auto", columns: Columns | None = None, split: str = "train"
) -> PairSource:
    """The source that a path or a hub id names.

    Raises:
        ValueError: it is none of those known.
        FileNotFoundError: a path that does not exist.
    """
    columns = columns or Columns()
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return DatasetSource(source, columns, split)
        if any(path.glob("*.tar")):
            raise ValueError(f"{source} holds tars; index them in place with --index-only, nothing to build")
        if any(path.glob("*.parquet")):
            return TableSource(path, columns)
        return FolderSource(path, captions)
    if path.is_file():
        if path.suffix.lower() not in _TABLES:
            raise ValueError(f"{source} given, expected a folder or a table ending in {', '.join(_TABLES)}")
        return TableSource(path, columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return DatasetSource(source, columns, split)
    raise FileNotFoundError(
        f"no source at {source}, expected a folder of images, a table, a saved data set or a hub id "
        "(owner/name)"
    )
