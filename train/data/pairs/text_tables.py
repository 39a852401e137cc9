"""Tables kept as text: CSV of every dialect, TSV, JSON lines and JSON; cells stay as they are written.

Encoding, separator and quoting are told from the file: a byte order mark or the zeros of UTF-16; the separator under
which the header has the columns; quotes only if the file read with them is well formed and read without them is not
better. What cannot be told is one sentence with the option to give.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import IMAGE_EXTENSIONS, suffix_of
from ..report import BadSample
from ..text import decode_text, guess_encoding
from .caption_files import captioned_images
from .cells import Columns

DELIMITED = (".csv", ".tsv", ".txt", ".tab", ".psv", ".token")
JSON_LINES = (".jsonl", ".ndjson")
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NAMED = {"tab": "\t", "\\t": "\t", **{name: mark for mark, name in _SEPARATORS.items()}}


@dataclass
class TextTable:
    """Rows of a table as (image, caption, nouns) cells, or what is wrong with a row."""

    columns: tuple[str, str, str | None]
    rows: list[tuple[Any, Any, Any] | BadSample]


def table_suffix(path: Path) -> str:
    """``.csv`` of ``a.CSV`` and of ``a.csv.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _OPENERS else suffix


def read_text_table(
    path: Path, columns: Columns, *, encoding: str | None = None, separator: str | None = None
) -> TextTable:
    """The rows of a CSV, TSV, JSON lines or JSON file.

    Args:
        columns: which are meant.
        encoding: of the text; None tells UTF-8 and UTF-16.
        separator: of the cells (``,``, ``tab`` …); None tells it from the header.

    Raises:
        ValueError: not text, not a table, or without the columns.
    """
    text = _read(path, encoding)
    suffix = table_suffix(path)
    if suffix in JSON_LINES:
        return _json_lines(text, columns, str(path))
    if suffix == ".json":
        # A file of JSON lines is often called .json.
        start = text.lstrip()[:1]
        if start == "{":
            first, _, rest = text.strip().partition("\n")
            if rest and _object(first) is not None:
                return _json_lines(text, columns, str(path))
        return _json(text, columns, str(path))
    first = text.split("\n", 1)[0]
    if separator is None and (suffix == ".token" or (suffix in (".txt", ".tsv") and _is_token_line(first))):
        return _tokens(text, str(path))
    return _delimited(text, columns, path, suffix, separator)


def _read(path: Path, encoding: str | None) -> str:
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:  # type: ignore[operator]
            data = file.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked ({str(error)[:100]})") from None
    try:
        return decode_text(data, encoding)
    except LookupError:
        raise ValueError(
            f"--encoding {encoding} given, expected one that Python knows, such as cp1252"
        ) from None
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise ValueError(
                f"{path} is not {encoding} text ({str(error)[:100]}); give its --encoding"
            ) from None
        guess = guess_encoding(data)
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data[start : start + 200].split(b"\n")[0].decode(guess, "replace")
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}. It may be {guess} (that line "
            f"would read {line[:80]!r}); give --encoding {guess}, or the right one"
        ) from None


def _delimited(text: str, columns: Columns, path: Path, suffix: str, separator: str | None) -> TextTable:
    csv.field_size_limit(1 << 30)
    if declared := re.match(r"sep=(.)\r?\n", text):  # Excel's own first line
        text, separator = text[declared.end() :], separator or declared[1]
    usual = "\t" if suffix in (".tsv", ".tab") else "|" if suffix == ".psv" else ","
    marks = [usual, *(mark for mark in _SEPARATORS if mark != usual)]
    if separator is not None:
        mark = _NAMED.get(separator, separator)
        if len(mark) != 1:
            raise ValueError(f"--separator {separator!r} given, expected one character, or tab")
        marks = [mark]
    headers = {mark: _header(text, mark) for mark in marks}
    fitting = [mark for mark in marks if _complete(columns, headers[mark])]
    if not fitting:
        mark = max(marks, key=lambda mark: len(headers[mark]))
        hint = ", its separator with --separator" if separator is None else ""
        columns.resolve(headers[mark], str(path), f"{hint}; a table without a header line needs one")
    mark = fitting[0]
    names = headers[mark]
    chosen = columns.resolve(names, str(path))
    if twice := [name for name in chosen if name is not None and names.count(name) > 1]:
        raise ValueError(
            f"{path} has {names.count(twice[0])} columns called {twice[0]!r} and only one could be read; give each "
            "a name of its own, or name another column."
        )
    places = tuple(None if name is None else names.index(name) for name in chosen)
    dialect = _dialect(text, mark, len(names), places[0] or 0)
    rows: list[tuple[Any, Any, Any] | BadSample] = []
    for number, cells in enumerate(_records(text, mark, dialect)):
        if number == 0:
            continue
        if not _fits(cells, len(names)):
            what = f"{len(cells)} cells, expected {len(names)}: {mark.join(cells)[:80]}"
            rows.append(BadSample("row of another length", f"row {number - 1}", what))
            continue
        rows.append(tuple(None if place is None else cells[place] for place in places))  # type: ignore[arg-type]
    return TextTable(chosen, rows)


def _complete(columns: Columns, names: list[str]) -> bool:
    image, caption, nouns = columns.find(names)
    return image is not None and caption is not None and (nouns is not None or columns.nouns is None)


def _header(text: str, mark: str) -> list[str]:
    return next(_records(text[: 1 << 20], mark, {}), [])


# Ways in which delimited files are quoted, the usual first.
_QUOTES: dict[str, Any] = {"doublequote": True, "strict": True}
_NO_QUOTES: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
_ESCAPED_QUOTES: dict[str, Any] = {"doublequote": False, "escapechar": "\\", "strict": True}
_ESCAPED: dict[str, Any] = {"quoting": csv.QUOTE_NONE, "escapechar": "\\"}
_SPACED: dict[str, Any] = {"doublequote": True, "strict": True, "skipinitialspace": True}
_LENIENT: dict[str, Any] = {"doublequote": True}


def _records(text: str, mark: str, dialect: dict[str, Any]) -> Iterator[list[str]]:
    """Records of the text that hold anything."""
    for cells in csv.reader(io.StringIO(text, newline=""), delimiter=mark, **dialect):
        if cells:
            yield cells


def _fits(cells: list[str], width: int) -> bool:
    """Whether a record has the header's cells; empty ones more are taken for nothing."""
    return len(cells) == width or (len(cells) > width and not any(cells[width:]))


def _dialect(text: str, mark: str, width: int, image: int) -> dict[str, Any]:
    """How the file quotes, by which reading has the fewest records that do not fit."""
    if '"' not in text and "\\" not in text:
        return _NO_QUOTES
    quoted, bare = _faults(text, mark, _QUOTES, width, image), _faults(text, mark, _NO_QUOTES, width, image)
    if quoted == 0 and not (bare == 0 and mark == "\t" and _quotes_are_letters(text, mark)):
        return _QUOTES
    if bare == 0:
        return _NO_QUOTES
    escaped = [_ESCAPED_QUOTES, _ESCAPED] if "\\" in text else []
    ways = [_QUOTES, _NO_QUOTES, *escaped, _SPACED, _LENIENT]
    return min(ways, key=lambda way: _faults(text, mark, way, width, image))


def _faults(text: str, mark: str, dialect: dict[str, Any], width: int, image: int) -> float:
    """Records that do not fit, and cells that have swallowed whole records; infinite where it cannot be read so."""
    faults = 0
    try:
        for cells in _records(text, mark, dialect):
            if not _fits(cells, width):
                faults += 1
                continue
            for cell in cells:
                if "\n" in cell and mark in cell:
                    inner = (line.split(mark) for line in cell.split("\n")[1:])
                    faults += sum(len(p) == width and _is_like(p[image], cells[image]) for p in inner)
    except csv.Error:
        return float("inf")
    return faults


def _is_like(cell: str, image: str) -> bool:
    """Whether a piece of text looks as what another row calls its image: a suffix, an address, numbers alike."""
    if suffix_of(cell) in IMAGE_EXTENSIONS or "://" in cell:
        return True
    return re.sub(r"\d+", "0", cell) == re.sub(r"\d+", "0", image)


def _quotes_are_letters(text: str, mark: str) -> bool:
    """Whether quotes around cells are part of the text, in a file that reads well with and without quoting.

    A writer that quotes does it where it must (a doubled quote within, several lines), or the whole column.
    """
    if sum(1 for _ in _records(text, mark, _QUOTES)) != sum(1 for _ in _records(text, mark, _NO_QUOTES)):
        return False
    needless: set[int] = set()
    unquoted: set[int] = set()
    for number, cells in enumerate(_records(text, mark, _NO_QUOTES)):
        for place, cell in enumerate(cells) if number else ():
            if len(cell) > 1 and cell[0] == cell[-1] == '"':
                if '""' not in cell[1:-1]:
                    needless.add(place)
            elif cell:
                unquoted.add(place)
    return bool(needless & unquoted)


def _is_token_line(line: str) -> bool:
    """Whether a line is Flickr30k's ``NAME.jpg#0<TAB>caption``, which has no header."""
    name, tab, _ = line.partition("\t")
    file, mark, number = name.rpartition("#")
    return bool(tab and mark and number.strip().isdigit() and suffix_of(file) in IMAGE_EXTENSIONS)


def _tokens(text: str, path: str) -> TextTable:
    rows: list[tuple[Any, Any, Any] | BadSample] = []
    for line in text.split("\n"):
        name, tab, caption = line.strip("\r").partition("\t")
        if not line.strip():
            continue
        if tab and "#" in name:
            rows.append((name.rpartition("#")[0], caption, None))
        else:
            rows.append(BadSample("row of another length", f"row {len(rows)}", line[:80]))
    return TextTable(("image", "caption", None), rows)


def _nothing(_: str) -> None:
    """What ``NaN`` and ``Infinity`` say, which pandas writes where there is nothing."""


def _object(line: str) -> Any:
    """A line of JSON; numbers stay as they are written. None where it is none."""
    try:
        return json.loads(line, parse_int=str, parse_float=str, parse_constant=_nothing)
    except (ValueError, RecursionError):
        return None


def _json_lines(text: str, columns: Columns, path: str) -> TextTable:
    entries: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            entries.append(_object(line))
    return _objects(entries, columns, path)


def _json(text: str, columns: Columns, path: str) -> TextTable:
    content = _object(text)
    if content is None:
        raise ValueError(f"{path} is not JSON, expected a list of objects, or an object a line as .jsonl")
    if isinstance(content, dict):
        if isinstance(content.get("images"), list):
            content = json.loads(text)  # ids are numbers there
            rows = [(names, captions, None) for _, names, captions in captioned_images(content, None, path)]
            return TextTable(("file_name", "caption", None), list(rows))
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1 and lists[0] and isinstance(lists[0][0], dict):
            content = lists[0]
        elif content and all(isinstance(value, list | dict) for value in content.values()):
            content = _rows_of_columns(content)
    if not isinstance(content, list):
        raise ValueError(f"{path} is no table, expected a list of objects, or an object a line as .jsonl")
    return _objects(content, columns, path)


def _rows_of_columns(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``{column: [cells]}`` or pandas' ``{column: {row: cell}}``."""
    cells = {
        name: value if isinstance(value, dict) else dict(enumerate(value)) for name, value in content.items()
    }
    rows = dict.fromkeys(row for column in cells.values() for row in column)
    return [{name: column.get(row) for name, column in cells.items()} for row in rows]


def _objects(entries: list[Any], columns: Columns, path: str) -> TextTable:
    names = list(dict.fromkeys(name for entry in entries if isinstance(entry, dict) for name in entry))
    chosen = columns.resolve(names, path)
    rows: list[tuple[Any, Any, Any] | BadSample] = []
    for number, entry in enumerate(entries):
        if isinstance(entry, dict):
            rows.append(tuple(None if name is None else entry.get(name) for name in chosen))  # type: ignore[arg-type]
        else:
            rows.append(BadSample("broken JSON", f"row {number}"))
    return TextTable(chosen, rows)
