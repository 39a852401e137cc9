"""What a format is, and what the readers of several share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...report import BadSample, SkipReport
from ..record_files import file_kind
from ..records import MAX_ADDRESS, Document, Picture, clean_text, image_source

Reader = Callable[[Mapping[str, Any], str, SkipReport | None], Document]


@dataclass(frozen=True)
class Format:
    """A way in which records are written.

    Attributes:
        name: what ``--format`` calls it.
        marks: the fields that tell it, for messages.
        columns: fields of a record that are read, the others stay in the file; None reads all.
        recognise: whether a record is of this format.
        read: the document of a record (record, key, report).
            Raises:
                BadSample: the record is not usable.
        pages: whether it holds web pages, for which the published filters were made.
        dialogues: whether it may hold any.
        accepts: whether a record can be read once the user names this format; as ``recognise`` by default.
        kind_of: what a file holds by its name (``jsonl``, ``parquet``, ``tar`` …); "" for one that is not read.
    """

    name: str
    marks: str
    columns: tuple[str, ...] | None
    recognise: Callable[[Mapping[str, Any]], bool]
    read: Reader
    pages: bool = False
    dialogues: bool = False
    accepts: Callable[[Mapping[str, Any]], bool] | None = None
    kind_of: Callable[[Path], str] = file_kind

    def could_be(self, record: Mapping[str, Any]) -> bool:
        """Whether a record may be read as this format."""
        return (self.accepts or self.recognise)(record)


def listed(value: Any) -> list[Any] | None:
    """A list, also of arrays that libraries give; None for anything else."""
    if hasattr(value, "tolist") and not isinstance(value, bytes | bytearray | memoryview):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def picture(value: Any, key: str, report: SkipReport | None, src: Any = None) -> Picture | None:
    """The picture that a cell names (bytes, base64, a path, an address, ``{bytes, path}``), None for an empty one."""
    source = image_source(value)
    if source is None or source == "":
        return None
    if not isinstance(src, str):
        src = source if isinstance(source, str) else source.get("path") if isinstance(source, dict) else None
    named = isinstance(src, str) and len(src) <= MAX_ADDRESS
    return Picture(source, clean_text(src, key, report) if named else "")


def shown(record: Mapping[str, Any], limit: int = 12) -> str:
    """The names of a record's fields, for messages."""
    names = [str(name)[:40] for name in record]
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "") or "none"


def only_texts(parts: Iterator[str | Picture], key: str) -> tuple[str | Picture, ...]:
    """Parts of which at least one says or shows something.

    Raises:
        BadSample: there is nothing.
    """
    kept = tuple(part for part in parts if isinstance(part, Picture) or part)
    if not any(isinstance(part, Picture) or part.strip() for part in kept):
        raise BadSample("empty document", key)
    return kept
