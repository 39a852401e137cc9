"""Cells of tables: which columns are meant, and what a cell says, whatever type a library gave it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

IMAGE_COLUMNS = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "image_path",
    "img_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "image_file",
    "image_name",
    "path",
    "file",
    "image_id",
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
    "comment",
    "description",
    "prompt",
    "label",
)
_LONGEST_LIST = 1 << 20
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_NUMPY_LIST = re.compile(rf"\[\s*(?:{_QUOTED})(?:\s+(?:{_QUOTED}))*\s*\]")


def plain(name: str) -> str:
    """A column's name without case, blanks around it and the difference of blanks, dashes and underscores."""
    return re.sub(r"[\s\-_]+", "_", name.replace("\ufeff", "").strip(' \t"\u00a0')).casefold()


@dataclass(frozen=True)
class Columns:
    """Names of columns; None takes the first usual name that the table has."""

    image: str | None = None
    caption: str | None = None
    nouns: str | None = None

    def find(self, names: Sequence[str]) -> tuple[str | None, str | None, str | None]:
        """(image, caption, nouns) column of a table with these columns, None for one that is not there."""
        known: dict[str, str] = {}
        for name in names:
            known.setdefault(plain(name), name)
        chosen = []
        for given, usual in (
            (self.image, IMAGE_COLUMNS),
            (self.caption, CAPTION_COLUMNS),
            (self.nouns, ()),
        ):
            if given is not None:
                chosen.append(given if given in names else known.get(plain(given)))
            else:
                chosen.append(next((known[name] for name in usual if name in known), None))
        return chosen[0], chosen[1], chosen[2]

    def resolve(self, names: Sequence[str], source: str, hint: str = "") -> tuple[str, str, str | None]:
        """:meth:`find` of a table that must have them; ``hint`` ends the message.

        Raises:
            ValueError: a column is not there.
        """
        image, caption, nouns = self.find(names)
        wanted = (
            ("image", self.image, image),
            ("caption", self.caption, caption),
            ("nouns", self.nouns, nouns),
        )
        for flag, given, found in wanted:
            if found is None and (given or flag != "nouns"):
                what = f"no column {given!r}" if given else f"no {flag} column"
                shown = ", ".join(repr(name[:60]) for name in names[:30]) or "none"
                raise ValueError(
                    f"{source} has {what}, its columns are {shown}; name one with --{flag}-column NAME{hint}"
                )
        assert image is not None
        assert caption is not None
        return image, caption, nouns


def listed(text: str) -> list[Any] | None:
    """The list that a text is the writing of (JSON, Python's or NumPy's ``['cat', 'dog']``); None for other texts."""
    inside = text.strip()
    if not (inside[:1] in "[(" and inside[-1:] in "])" and 2 <= len(inside) <= _LONGEST_LIST):
        return None
    if _NUMPY_LIST.fullmatch(inside):
        return [ast.literal_eval(part) for part in re.findall(_QUOTED, inside)]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(inside)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(found, list | tuple):
            return list(found)
    return None


def text_of(cell: Any) -> str | None:
    """What a cell says as text; None where it says nothing or is no text (an object, bytes of no encoding)."""
    if isinstance(cell, dict):
        cell = next((cell[key] for key in ("raw", "caption", "text") if isinstance(cell.get(key), str)), None)
    if isinstance(cell, bytes | bytearray | memoryview):
        try:
            return bytes(cell).decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    if cell is None or isinstance(cell, dict | list | tuple) or (isinstance(cell, float) and cell != cell):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    return cell if isinstance(cell, str) else str(cell)


def texts_of(cell: Any) -> list[str]:
    """All texts of a cell: one, or those of a list, also of a list that was saved as text."""
    if hasattr(cell, "tolist") and not isinstance(cell, bytes | bytearray | memoryview | str):
        cell = cell.tolist()
    if isinstance(cell, str):
        found = listed(cell)
        if found is None or not all(isinstance(item, str | dict | int | float) for item in found):
            return [cell]
        # "[1]" is a text, "['a']" is a list of texts.
        cell = found if any(isinstance(item, str | dict) for item in found) else [cell]
    items: Iterable[Any] = cell if isinstance(cell, list | tuple) else [cell]
    return [text for item in items if (text := text_of(item)) is not None]
