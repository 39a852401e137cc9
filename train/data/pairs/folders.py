"""Folders of pictures: captions beside them, in a ``metadata`` table as ``datasets`` keeps it, or in their names.

Everything in the folder that is not read is noted by reason: suffixes that are no pictures, captions without a
picture, folders that cannot be opened, links that lead out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from ....models.inside import is_inside
from ....models.pictures import PictureError, read_picture_file
from ..names import (
    CAPTION_EXTENSIONS,
    CAPTION_KEYS,
    IMAGE_EXTENSIONS,
    JSON_EXTENSIONS,
    caption_from_path,
    is_litter,
    suffix_of,
)
from ..report import BadSample, SkipReport
from ..text import decode_text
from .cells import Columns, texts_of
from .pair_source import RawPair
from .text_tables import DELIMITED, read_text_table

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MODES = ("auto", "sidecar", "names", "metadata")
# Beside pictures these say something about them or about the download, and are no loss.
_KNOWN = frozenset({*METADATA, "manifest.json", "classes.txt"})
_LONGEST_TEXT = 16 << 20
# Larger tables are not read on the mere suspicion that they hold captions.
_SUSPECTED = 256 << 20


def walk_pictures(
    root: str | Path, *, follow_links: bool, unused: SkipReport
) -> Iterator[tuple[str, list[str]]]:
    """(folder relative to ``root``, its files that count), sorted; the rest is noted in ``unused``.

    Hidden files and folders are left out, links out of ``root`` too unless ``follow_links``; no folder is entered
    twice.
    """
    root = Path(root)
    seen = {os.path.realpath(root)}

    def failed(error: OSError) -> None:
        unused.note("unreadable folder", os.path.relpath(error.filename, root), str(error.strerror))

    for folder, folders, files in os.walk(root, followlinks=follow_links, onerror=failed):
        below = os.path.relpath(folder, root)
        kept = []
        for name in sorted(folders):
            path = os.path.join(folder, name)
            if is_litter(name):
                unused.note("hidden or system folder", os.path.normpath(os.path.join(below, name)))
            elif os.path.islink(path):
                target = os.path.realpath(path)
                if follow_links and target not in seen:
                    seen.add(target)
                    kept.append(name)
                else:
                    why = "its target was read" if follow_links else "use --follow-links"
                    unused.note("link to a folder, not followed", os.path.join(below, name), why)
            elif not follow_links or os.path.realpath(path) not in seen:
                if follow_links:
                    seen.add(os.path.realpath(path))
                kept.append(name)
        folders[:] = kept
        found = []
        for name in sorted(files):
            path = os.path.join(folder, name)
            if is_litter(name):
                unused.note("hidden or system file", os.path.normpath(os.path.join(below, name)))
            elif (
                os.path.islink(path) and not follow_links and not is_inside(root, os.path.relpath(path, root))
            ):
                unused.note(
                    "link out of the folder, not followed", os.path.join(below, name), "use --follow-links"
                )
            elif not os.path.isfile(path):
                unused.note("no file", os.path.normpath(os.path.join(below, name)))
            else:
                found.append(name)
        yield below, found


class FolderSource:
    """Images under a folder, in order of their paths.

    Args:
        root: searched recursively.
        captions: ``metadata`` (a table ``metadata.csv``, ``.jsonl`` or ``.parquet`` as ``datasets`` has it),
            ``sidecar`` (``a.txt``, ``a.json`` … beside ``a.jpg``), ``names`` (file and folder names), or ``auto``:
            whichever of them there is, in this order.
        columns: of the metadata tables.
        follow_links: whether links may lead out of the folder.

    Raises:
        ValueError: no images, unknown ``captions``, or captions that lie in a table that must be given itself.
    """

    def __init__(
        self,
        root: str | Path,
        captions: str = "auto",
        columns: Columns | None = None,
        *,
        follow_links: bool = False,
    ) -> None:
        if captions not in MODES:
            raise ValueError(f"--captions {captions} given, expected auto, sidecar or names, or metadata")
        self.root, self.captions, self.columns = Path(root), captions, columns or Columns()
        self.unused = SkipReport()
        self.paths: list[str] = []
        self._beside: dict[str, str] = {}
        self._listed: dict[str, tuple[Any, Any] | None] = {}
        tables: list[str] = []
        for below, files in walk_pictures(self.root, follow_links=follow_links, unused=self.unused):
            self._add_folder(below, files, tables)
        if not self.paths:
            others = "; ".join(self.unused.lines(3))
            raise ValueError(
                f"{root} holds no image, expected files ending in {', '.join(IMAGE_EXTENSIONS)}"
                + (f" (not read: {others})" if others else "")
            )
        if captions in ("auto", "metadata"):
            self._read_tables(tables)
        if captions == "metadata" and not tables:
            raise ValueError(f"--captions metadata given, but {root} holds none of {', '.join(METADATA)}")
        if captions == "auto" and not self._beside and not self._listed:
            self._refuse_table_beside()

    def _add_folder(self, below: str, files: list[str], tables: list[str]) -> None:
        stems: dict[str, str] = {}
        texts: list[str] = []
        for name in files:
            suffix = suffix_of(name)
            path = os.path.normpath(os.path.join(below, name))
            if suffix in IMAGE_EXTENSIONS:
                self.paths.append(path)
                stems[os.path.splitext(name)[0]] = path
            elif name in METADATA:
                tables.append(path)
            elif suffix in (*CAPTION_EXTENSIONS, *JSON_EXTENSIONS):
                texts.append(name)
            elif name not in _KNOWN:
                self.unused.note(f"file not read (.{suffix})" if suffix else "file not read", path)
        order = (*CAPTION_EXTENSIONS, *JSON_EXTENSIONS)
        for name in sorted(texts, key=lambda name: order.index(suffix_of(name))):
            stem, path = os.path.splitext(name)[0], os.path.normpath(os.path.join(below, name))
            if stem in stems:
                self._beside.setdefault(os.path.splitext(stems[stem])[0], path)
            elif name not in _KNOWN:
                self.unused.note("text without a picture", path)

    def _read_tables(self, tables: list[str]) -> None:
        columns = Columns("file_name", self.columns.caption, self.columns.nouns)
        there = set(self.paths)
        for table in tables:
            folder = os.path.dirname(table)
            try:
                rows = _metadata_rows(self.root / table, columns)
            except ValueError as error:
                if self.captions == "metadata" or self.columns.caption:
                    raise
                self.unused.note("metadata not used", table, str(error)[:200])
                continue
            # A picture below a metadata table that has no row in it has no caption.
            prefix = f"{folder}/" if folder else ""
            self._listed.update(
                {path: None for path in self.paths if path.startswith(prefix) and path not in self._listed}
            )
            for number, row in enumerate(rows):
                if isinstance(row, BadSample):
                    self.unused.note(row.reason, f"{table} {row.name}", row.detail)
                    continue
                path = os.path.normpath(os.path.join(folder, str(row[0])))
                if path in there:
                    self._listed[path] = (row[1], row[2])
                else:
                    self.unused.note("row without its picture", f"{table} row {number}", str(row[0]))

    def _refuse_table_beside(self) -> None:
        """Names are no captions where a table with captions lies in the folder or above it."""
        for path in sorted(self.root.iterdir()):
            if path.suffix.lower() not in (*DELIMITED, ".jsonl", ".json") or is_litter(path.name):
                continue
            if not path.is_file() or path.stat().st_size > _SUSPECTED or not is_inside(self.root, path.name):
                continue
            try:
                read_text_table(path, self.columns)
            except (ValueError, OSError):
                continue
            raise ValueError(
                f"the pictures of {self.root} have no captions beside them, but {path.name} is a table with captions; "
                f"give {path} itself with --image-root FOLDER, or --captions names if names are what you mean"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "unused": SkipReport()}

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Of the paths and how captions are made."""
        parts = [self.captions, *self.paths]
        if self._listed:
            parts += [repr(self._listed.get(path)) for path in self.paths]
        return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()

    def rows(self, start: int, stop: int) -> Iterator[RawPair | BadSample]:
        for path in self.paths[start:stop]:
            try:
                captions, nouns = self._captions(path)
                yield RawPair(path, read_image(self.root / path, path), captions, nouns)
            except BadSample as bad:
                yield bad
            except OSError as error:
                yield BadSample("unreadable file", path, str(error.strerror))

    def pictures_of_rows(self) -> Iterator[Hashable]:
        return iter(self.paths)

    def _captions(self, path: str) -> tuple[list[str], Any]:
        if self.captions == "names":
            return [caption_from_path(path)], None
        row = self._listed.get(path)
        if row is not None:
            return texts_of(row[0]), row[1]
        beside = self._beside.get(os.path.splitext(path)[0]) if self.captions != "metadata" else None
        if beside is not None:
            return self._sidecar(beside, path)
        if path in self._listed or self.captions == "metadata":
            raise BadSample("no row in the metadata table", path)
        if self.captions == "sidecar":
            raise BadSample("no caption file", path)
        return [caption_from_path(path)], None

    def _sidecar(self, beside: str, path: str) -> tuple[list[str], Any]:
        with open(self.root / beside, "rb") as file:
            data = file.read(_LONGEST_TEXT + 1)
        if len(data) > _LONGEST_TEXT:
            raise BadSample("caption too long", path, f"{beside} has more than {_LONGEST_TEXT >> 20} MiB")
        try:
            text = decode_text(data)
        except UnicodeDecodeError:
            raise BadSample("text not UTF-8", path, beside) from None
        if suffix_of(beside) not in JSON_EXTENSIONS:
            return [text], None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("broken JSON", path, str(error)[:100]) from None
        if not isinstance(content, dict):
            raise BadSample("no caption in the JSON beside it", path)
        cell = next((content[key] for key in CAPTION_KEYS if content.get(key)), None)
        return texts_of(cell), content.get("nouns")


def read_image(path: Path, name: str) -> bytes:
    """Bytes of a picture's file; ``name`` stands in the report.

    Raises:
        BadSample: it cannot be read, is no file, or larger than any picture.
    """
    try:
        return read_picture_file(path)
    except PictureError as error:
        raise BadSample("unreadable file", name, error.reason) from None


def _metadata_rows(path: Path, columns: Columns) -> list[Any]:
    if path.suffix != ".parquet":
        return read_text_table(path, columns).rows
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    names = columns.resolve(table.column_names, str(path))
    kept = table.select([name for name in dict.fromkeys(names) if name]).to_pylist()
    return [tuple(None if name is None else row[name] for name in names) for row in kept]
