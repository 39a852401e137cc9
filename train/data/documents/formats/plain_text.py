"""Plain text: a record with a ``text``, as dumps of encyclopedias have them, or a file of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...report import BadSample, SkipReport
from ..record_files import file_kind
from ..records import Document, clean_text
from .format import Format, only_texts

_FIELDS = ("text", "content")
_ABOUT = ("url", "title", "id")
_FILES = (".txt", ".text", ".md")


def _recognise(record: Mapping[str, Any]) -> bool:
    return any(isinstance(record.get(field), str) for field in _FIELDS)


def read_text(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a record.

    Raises:
        BadSample: it has no text.
    """
    text = next((record[field] for field in _FIELDS if isinstance(record.get(field), str)), None)
    if text is None:
        raise BadSample("no text", key)
    about = {name: record[name] for name in _ABOUT if isinstance(record.get(name), str | int)}
    general = clean_text(json.dumps(about, ensure_ascii=False), key, report) if about else ""
    return Document(key, only_texts(iter([clean_text(text, key, report)]), key), general)


def _kind_of(path: Path) -> str:
    return "text" if path.suffix.lower() in _FILES else file_kind(path)


TEXT = Format("text", "text", (*_FIELDS, *_ABOUT), _recognise, read_text, kind_of=_kind_of)
