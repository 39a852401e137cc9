"""Samples of WebDataset tars, as ``img2dataset`` writes them: a picture and what is said of it.

A sample is ``{"members": {"jpg": …, "txt": …, "json": …}}``. The caption is found as in training pairs
(:mod:`...pairs.captions`). Tars whose ``json`` is a record of another format (mmc4 with its pictures inside, dialogues)
are read as that; pictures which such a record only names are the sample's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...names import JSON_EXTENSIONS, is_image
from ...pairs.captions import described, read_captions
from ...report import BadSample, SkipReport
from ...shards.reader import Record
from ...shards.scan import COMPRESSED_SUFFIXES
from ..record_files import MAX_RECORD
from ..records import Document, Picture
from .format import Format
from .llava import LLAVA
from .messages import MESSAGES
from .mmc4 import MMC4
from .obelics import OBELICS

_INSIDE = (OBELICS, MMC4, LLAVA, MESSAGES)


def _recognise(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("members"), Mapping)


def read_sample(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a sample.

    Raises:
        BadSample: it has no picture, or nothing is said of it.
    """
    members = record.get("members")
    if not isinstance(members, Mapping):
        raise BadSample("not a sample of a tar", key)
    sample = Record(key, "", 0, {name: memoryview(data) for name, data in members.items()})
    pictures = [bytes(data) for name, data in sorted(members.items()) if is_image(name)]
    if (found := _inside(members)) is not None:
        kind, content = found
        if pictures and kind in (LLAVA, MESSAGES):
            content = {**content, "image": None, "images": pictures}
        return kind.read(content, key, report)
    if not pictures:
        raise BadSample("no image", key)
    captions = read_captions(sample, report)
    if len(captions) > 1 and report is not None:
        report.note("further captions of a picture, not read", key, count=len(captions) - 1)
    if len(pictures) > 1 and report is not None:
        report.note("further pictures of a caption, not read", key, count=len(pictures) - 1)
    url = described(sample).get("url")
    address = url if isinstance(url, str) else ""
    general = json.dumps({"url": address}) if address else ""
    return Document(key, (Picture(pictures[0], address[:8192]), captions[0]), general)


def _inside(members: Mapping[str, bytes]) -> tuple[Format, dict[str, Any]] | None:
    """The format that a sample's ``json`` is a record of."""
    for extension in JSON_EXTENSIONS:
        data = members.get(extension)
        if data is None or len(data) > MAX_RECORD:
            continue
        try:
            content = json.loads(bytes(data))
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return next(((kind, content) for kind in _INSIDE if kind.recognise(content)), None)
    return None


def _kind_of(path: Path) -> str:
    # Compressed ones too, which are refused with what to do about it.
    return "tar" if path.name.lower().endswith((".tar", *COMPRESSED_SUFFIXES)) else ""


WEBDATASET = Format(
    "webdataset", "tars of samples", None, _recognise, read_sample, dialogues=True, kind_of=_kind_of
)
