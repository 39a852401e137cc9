"""Where pairs come from before they are shards: folders, tables and ``datasets`` data sets."""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

from ....models.inside import Outside, inside, is_inside
from ....models.received import check_regular
from ..names import IMAGE_EXTENSIONS, caption_from_path, is_litter
from ..parquet_rows import check_groups, read_rows
from ..plugins import SOURCES, load_plugin
from ..report import BadSample, SkipReport
from ..shards.scan import COMPRESSED_SUFFIXES
from .cells import Columns, texts_of
from .folders import FolderSource, read_image
from .pair_source import PairSource, RawPair, Rows, picture_of
from .text_tables import DELIMITED, JSON_LINES, TextTable, read_text_table, table_suffix

_TABLES = (*DELIMITED, *JSON_LINES, ".json", ".parquet")
_BATCH = 64  # rows of Parquet decoded at once; a row may hold a picture's bytes
Turn = Callable[[Any], Any]


class TableSource:
    """CSV, TSV, JSON lines, JSON or Parquet (a file, or a folder of Parquet files).

    The image column holds paths below ``image_root`` or the encoded bytes. Parquet is read a few rows at a time, the
    others are held in memory.

    Args:
        path: the table.
        columns: which are meant.
        image_root: where paths start; the table's folder by default.
        follow_links: whether links there may lead out of it.
        encoding, separator: of a text table, where they cannot be told.

    Raises:
        ValueError: not a readable table, or without the columns.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Columns,
        *,
        image_root: str | Path | None = None,
        follow_links: bool = False,
        encoding: str | None = None,
        separator: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.unused = SkipReport()
        whole = self.path.is_dir()
        self.files = [
            str(file) for file in (parquet_files(self.path, follow_links) if whole else [self.path])
        ]
        folder = self.path if whole else self.path.parent
        self.pictures = Pictures(folder if image_root is None else image_root, follow_links)
        self._options = {"encoding": encoding, "separator": separator}
        self._root = None if image_root is None else str(image_root)
        self._given = columns
        self._table: TextTable | None = None
        self._turns: dict[str, Turn] = {}
        try:
            if self.kind == "parquet":
                self._open_parquet()
            else:
                table = self._read_text()
                self.columns, self.ends = table.columns, [len(table.rows)]
        except OSError as error:  # pyarrow's errors derive from it or from ValueError
            raise ValueError(f"{path} is not a readable {self.kind} table ({str(error)[:200]})") from None
        if not self.ends or self.ends[-1] == 0:
            raise ValueError(f"{path} holds no rows, expected a pair a row")

    def _open_parquet(self) -> None:
        import pyarrow.parquet as parquet

        self.ends, total = [], 0
        names: list[str] = []
        for number, file in enumerate(self.files):
            try:
                opened = parquet.ParquetFile(file)
                schema, rows = opened.schema_arrow, opened.metadata.num_rows
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} is not a readable parquet table ({str(error)[:200]})") from None
            if number == 0:
                names = list(schema.names)
                self._turns = _turns(schema)
            elif lacking := sorted(set(filter(None, self._given.find(names))) - set(schema.names)):
                raise ValueError(
                    f"{file} has other columns than {self.files[0]}, it lacks {', '.join(lacking)}; give tables alike"
                )
            total += rows
            self.ends.append(total)
        self.columns = self._given.resolve(names, str(self.path))
        for file in self.files:
            try:
                check_groups(parquet.ParquetFile(file).metadata, self._wanted(), str(file))
            except BadSample as bad:
                raise ValueError(f"{bad.name} is not read: {bad.reason} ({bad.detail})") from None

    def _wanted(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys(name for name in self.columns if name))

    @property
    def kind(self) -> str:
        """``parquet`` or ``text``."""
        return "parquet" if self.path.is_dir() or table_suffix(self.path) == ".parquet" else "text"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None, "_turns": {}, "unused": SkipReport()}

    def __len__(self) -> int:
        return self.ends[-1]

    def digest(self) -> str:
        """Of the files (of Parquet their sizes and ends) and how they are read, not of where they lie."""
        parts = [repr(self.columns), repr(self._options), repr(self._root)]
        for file in self.files:
            with open(file, "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                if self.kind == "parquet":
                    opened.seek(max(0, size - (1 << 20)))
                parts.append(f"{Path(file).name}:{size}:{hashlib.file_digest(opened, 'sha256').hexdigest()}")
        return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()

    def _read_text(self) -> TextTable:
        if self._table is None:
            self._table = read_text_table(self.path, self._given, **self._options)
        return self._table

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        if self.kind != "parquet":
            for row, cells in enumerate(self._read_text().rows[start:stop], start):
                yield cells if isinstance(cells, BadSample) else self.pictures.pair(*cells, f"row {row}")
            return
        row = start
        while row < stop:
            file = bisect_right(self.ends, row)
            first = self.ends[file - 1] if file else 0
            last = min(stop, self.ends[file])
            for cells in self._parquet_cells(file, row - first, last - first):
                image, caption, nouns = (
                    None if name is None else self._turn(name, cells[name]) for name in self.columns
                )
                yield self.pictures.pair(image, caption, nouns, f"row {row}")
                row += 1

    def pictures_of_rows(self) -> Iterator[Hashable]:
        if self.kind != "parquet":
            # a row that cannot be read is on neither side of anything
            return (picture_of(None if isinstance(c, BadSample) else c[0]) for c in self._read_text().rows)
        return self._parquet_pictures()

    def _parquet_pictures(self) -> Iterator[Hashable]:
        import pyarrow.parquet as parquet

        image = self.columns[0]
        assert image is not None
        for file in self.files:
            with parquet.ParquetFile(file) as table:
                for cells in read_rows(table, [image], 0, table.metadata.num_rows, _BATCH):
                    yield picture_of(cells[image])

    def _turn(self, name: str, cell: Any) -> Any:
        return self._turns[name](cell) if name in self._turns else cell

    def _parquet_cells(self, file: int, start: int, stop: int) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.files[file]) as table:
            self._turns = self._turns or _turns(table.schema_arrow)
            yield from read_rows(table, self._wanted(), start, stop, _BATCH)


def parquet_files(folder: Path, follow_links: bool = False) -> list[Path]:
    """The Parquet files anywhere in a folder; hidden ones and links that lead out are left out."""
    found = []
    for path in sorted(folder.rglob("*.parquet")):
        below = str(path.relative_to(folder))
        if path.name == "metadata.parquet" or is_litter(below) or not path.is_file():
            continue
        if is_inside(folder, below, follow_links=follow_links):
            found.append(path)
    return found


def _turns(schema: Any) -> dict[str, Turn]:
    """For columns that ``datasets`` wrote as numbers of classes: from the number to the name."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        return _class_names(datasets.Features.from_arrow_schema(schema))
    except (ValueError, TypeError, KeyError):
        return {}


def _class_names(features: Any) -> dict[str, Turn]:
    import datasets

    turns: dict[str, Turn] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
        if isinstance(feature, datasets.ClassLabel):
            turns[name] = _Named(feature.names)
        elif isinstance(inner, datasets.ClassLabel):
            turns[name] = _Named(inner.names)
    return turns


class _Named:
    """Names of class numbers; what is no number of a class stays."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __call__(self, cell: Any) -> Any:
        if isinstance(cell, list | tuple):
            return [self(item) for item in cell]
        known = isinstance(cell, int) and 0 <= cell < len(self.names)
        return self.names[cell] if known else None if cell == -1 else cell


class DatasetSource:
    """A ``datasets`` data set: a ``save_to_disk`` folder or a hub id.

    Raises:
        ValueError: cannot be loaded, or without the columns or split.
    """

    def __init__(
        self,
        source: str,
        columns: Columns,
        split: str = "train",
        *,
        image_root: str | Path | None = None,
        follow_links: bool = False,
    ) -> None:
        import datasets.config

        self.unused = SkipReport()
        root: str | Path = source
        try:
            if os.path.isdir(source):
                loaded = datasets.load_from_disk(source)
            else:
                loaded, root = datasets.load_dataset(source, split=split), datasets.config.HF_CACHE_HOME
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
        self.pictures = Pictures(root if image_root is None else image_root, follow_links)
        self._turns = _class_names(self.data.features)
        for name, feature in self.data.features.items():
            if isinstance(feature, datasets.Image):
                self.data = self.data.cast_column(name, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def digest(self) -> str:
        """The library's fingerprint of the data, and the columns."""
        return hashlib.sha256(f"{self.data._fingerprint}{self.columns}".encode()).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        wanted = self.data.select_columns(list(dict.fromkeys(name for name in self.columns if name)))
        for row in range(start, stop):
            cells = wanted[row]
            image, caption, nouns = (
                None if name is None else self._turns.get(name, _same)(cells[name]) for name in self.columns
            )
            yield self.pictures.pair(image, caption, nouns, f"row {row}")

    def pictures_of_rows(self) -> Iterator[Hashable]:
        image = self.columns[0]
        return (picture_of(cells[image]) for cells in self.data.select_columns([image]))


def _same(cell: Any) -> Any:
    return cell


class Pictures:
    """The pictures that cells of a table mean: encoded bytes, ``{bytes, path}``, or paths below a folder.

    Args:
        root: the folder; names that lead out of it are not read.
        follow_links: whether links in it may lead out.
    """

    def __init__(self, root: str | Path, follow_links: bool = False) -> None:
        if not Path(root).is_dir():
            raise ValueError(
                f"--image-root {root} given, expected the folder that the table's paths start from"
            )
        self.given, self.follow_links = Path(root), follow_links

    def pair(self, image: Any, caption: Any, nouns: Any, name: str) -> RawPair | BadSample:
        """A pair of a row's cells, or what is wrong with it."""
        names: tuple[str, ...] = ()
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, int) and not isinstance(image, bool):
            image = str(image)
        if isinstance(image, str):
            names = (image,)
        elif isinstance(image, tuple):
            names = image
        if names:
            name = f"{name} {names[0]}"
            try:
                image = self._read(names, name)
            except BadSample as bad:
                return bad
        if not isinstance(image, bytes | bytearray):
            return BadSample("no image", name)
        captions = texts_of(caption)
        if not captions and caption is not None and caption != []:
            return BadSample("caption is no text", name, type(caption).__name__)
        return RawPair(name, bytes(image), captions, nouns)

    def _read(self, names: tuple[str, ...], name: str) -> bytes:
        if any("://" in one for one in names):
            raise BadSample("image is a URL", name, "fetch it first")
        for one in names:
            for written in dict.fromkeys((one, one.strip(), one.strip().replace("\\", "/"))):
                try:
                    path = self._find(written)
                except Outside:
                    if written.replace("\\", "/") != written:
                        continue
                    raise BadSample("path leads out of the image folder", name, "see --image-root") from None
                if path is not None:
                    return read_image(path, name)
        raise BadSample("unreadable file", name, f"No such file in {self.given}")

    def _find(self, name: str) -> Path | None:
        """The file of a name, with a picture's suffix where it lacks one."""
        path = inside(self.given, name, follow_links=self.follow_links)
        if path.is_file():
            return path
        for extension in (*IMAGE_EXTENSIONS, *(one.upper() for one in IMAGE_EXTENSIONS)):
            try:
                longer = inside(self.given, f"{name}.{extension}", follow_links=self.follow_links)
            except Outside:
                continue
            if longer.is_file():
                return longer
        return None


def open_source(
    source: str,
    *,
    captions: str = "auto",
    columns: Columns | None = None,
    split: str = "train",
    image_root: str | Path | None = None,
    follow_links: bool = False,
    encoding: str | None = None,
    separator: str | None = None,
) -> PairSource:
    """The source that a path or a hub id names, or ``NAME:ANYTHING`` for the entry point NAME of ``interloom.sources``,
    which makes a :class:`PairSource` of ``ANYTHING``; the other arguments are those of the sources.

    Raises:
        ValueError: it is none of those known.
        FileNotFoundError: a path that does not exist.
    """
    scheme, mark, rest = source.partition(":")
    if mark and (plugin := load_plugin(SOURCES, scheme)) is not None:
        return plugin(rest)
    columns = columns or Columns()
    path = Path(source)
    check_regular(path)
    paths: dict[str, Any] = {"image_root": image_root, "follow_links": follow_links}
    text: dict[str, Any] = {"encoding": encoding, "separator": separator}
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return DatasetSource(source, columns, split, **paths)
        tars = [
            one.name for one in path.iterdir() if one.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES))
        ]
        if any(not is_litter(name) for name in tars):
            raise ValueError(f"{source} holds tars; index them in place with --index-only, nothing to build")
        if _is_table_folder(path, columns, follow_links):
            return TableSource(path, columns, **paths, **text)
        return FolderSource(path, captions, columns, follow_links=follow_links)
    if path.is_file():
        if path.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES)):
            raise ValueError(f"{source} is a tar; index it in place with --index-only, nothing to build")
        if table_suffix(path) not in _TABLES:
            raise ValueError(f"{source} given, expected a folder or a table ending in {', '.join(_TABLES)}")
        return TableSource(path, columns, **paths, **text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        return DatasetSource(source, columns, split, **paths)
    raise FileNotFoundError(
        f"no source at {source}, expected a folder of images, a table, a saved data set or a hub id "
        "(owner/name)"
    )


def _is_table_folder(path: Path, columns: Columns, follow_links: bool) -> bool:
    """Whether a folder is a table of Parquet files; those beside pictures, as ``img2dataset`` leaves them, are not."""
    files = parquet_files(path, follow_links)
    if not files:
        return False
    import pyarrow.parquet as parquet

    try:
        names = parquet.ParquetFile(files[0]).schema_arrow.names
    except (OSError, ValueError):
        names = []
    if columns.find(names)[0] is not None:
        return True
    walk = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return not any(name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS for name in walk)


__all__ = [
    "Columns",
    "FolderSource",
    "PairSource",
    "RawPair",
    "Rows",
    "TableSource",
    "caption_from_path",
    "open_source",
]
