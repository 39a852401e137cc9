"""Captioned pictures as documents of one image and its caption: LAION, CC, PMD and their like.

The columns are found by the names that ``interloom data pairs`` knows, and by those of lists of addresses
(``URL``, ``image_url``). A picture with several captions is stored once, with the first of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .....models.pictures import picture_suffix
from ...pairs.captions import clean_captions
from ...pairs.cells import CAPTION_COLUMNS, IMAGE_COLUMNS, plain, texts_of
from ...pairs.text_tables import DELIMITED, table_suffix
from ...report import BadSample, SkipReport
from ..record_files import file_kind
from ..records import Document
from .format import Format, picture

_ADDRESSES = ("url", "image_url", "img_url", "raw_url", "src")
_ABOUT = ("url", "source", "license")
# What lists of pictures' addresses have beside them.
_OF_PICTURES = {"width", "height", "similarity", "original_width", "original_height", "pwatermark"}


def pair_columns(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(image columns, caption columns) among the names of a record's fields, the likeliest first."""
    known: dict[str, str] = {}
    for name in names:
        known.setdefault(plain(str(name)), name)
    images = [known[name] for name in (*IMAGE_COLUMNS, *_ADDRESSES) if name in known]
    return images, [known[name] for name in CAPTION_COLUMNS if name in known]


def _accepts(record: Mapping[str, Any]) -> bool:
    images, captions = pair_columns(list(record))
    return bool(images and captions) and _caption(record, captions) is not None


def _recognise(record: Mapping[str, Any]) -> bool:
    """Records that are surely pairs: a page's ``url`` beside its ``text`` is no picture."""
    if not _accepts(record):
        return False
    name = pair_columns(list(record))[0][0]
    if plain(name) not in ("url", "src"):
        return True
    known = {plain(str(field)) for field in record}
    address = record[name]
    return bool(known & _OF_PICTURES) or (isinstance(address, str) and picture_suffix(address.split("?")[0]))


def _caption(record: Mapping[str, Any], columns: list[str]) -> list[str] | None:
    for name in columns:
        cell = record[name]
        if isinstance(cell, str | list | tuple) or hasattr(cell, "tolist"):
            return texts_of(cell)
    return None


def read_pair(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a record.

    Raises:
        BadSample: it names no picture, or says nothing about it.
    """
    images, captions = pair_columns(list(record))
    found = None
    for name in images:
        cell = record[name]
        if isinstance(cell, list | tuple) and len(cell) == 1:
            cell = cell[0]
        found = picture(cell, key, report)
        if found is not None:
            break
    if found is None:
        raise BadSample("no image", key)
    texts = clean_captions(list(_caption(record, captions) or []), key, report)
    if not texts:
        raise BadSample("empty caption", key)
    if len(texts) > 1 and report is not None:
        report.note("further captions of a picture, not read", key, count=len(texts) - 1)
    about = {name: record[name] for name in _ABOUT if isinstance(record.get(name), str)}
    general = json.dumps(about) if about else ""
    return Document(key, (found, texts[0]), general)


def _kind_of(path: Path) -> str:
    """Text tables are read as ``interloom data pairs`` reads them."""
    return "table" if table_suffix(path) in (*DELIMITED, ".json") else file_kind(path)


PAIRS = Format(
    "pairs",
    "an image column and a caption column",
    None,
    _recognise,
    read_pair,
    accepts=_accepts,
    kind_of=_kind_of,
)
