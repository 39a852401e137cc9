"""Columns of ``messages`` as OpenAI's interface takes them: ``{"role": …, "content": …}``.

Content is a text, or a list of parts: ``text``, ``image_url`` (an object with ``url``, or the address itself) and
``image``, which holds its picture (``image``, ``url``, ``path``, ``base64``, ``bytes``) or, as in tables of
``datasets``, stands for the next of the record's ``images``. In a text, ``<image>`` does. ``weight: 0`` keeps an
answer from being learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...report import BadSample, SkipReport
from ..records import Document, Picture, image_source
from .dialogue import Said, dialogue, has_turns, marked, pictures_of, role_of, turns_of, with_images
from .format import Format, listed, picture

_TURNS = ("messages", "conversations", "conversation")
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_HELD = ("image_url", "image", "url", "path", "base64", "bytes", "data")


def _recognise(record: Mapping[str, Any]) -> bool:
    return has_turns(record, _TURNS, "role")


def read_messages(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a record.

    Raises:
        BadSample: what it holds is no dialogue, or its images are not those of its texts.
    """
    turns = turns_of(record, _TURNS, key)
    if turns is None:
        raise BadSample("no messages list", key)
    said = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadSample("turn without role and content", key)
        role = role_of(turn.get("role"), key)
        weight = turn.get("weight")
        said.append(
            Said(role, _content(turn.get("content"), key, report), learn=weight is None or weight != 0)
        )
    if not said:
        raise BadSample("empty conversation", key)
    images = pictures_of(record.get("images"), key, report) or pictures_of(record.get("image"), key, report)
    with_images(said, images, key)
    return dialogue(said, key, report, record)


def _content(content: Any, key: str, report: SkipReport | None) -> list[str | Picture | None]:
    if isinstance(content, str):
        return marked(content)
    items = listed(content)
    if items is None:
        raise BadSample("content is neither text nor a list of parts", key, type(content).__name__)
    parts: list[str | Picture | None] = []
    for item in items:
        if isinstance(item, str):
            parts += marked(item)
            continue
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind in _TEXTS:
            text = item.get("text")
            if not isinstance(text, str):
                raise BadSample("text part without a text", key)
            parts.append(text)
        elif kind in _IMAGES:
            parts.append(_held(item, key, report))
        else:
            raise BadSample("part that is neither text nor image", key, repr(kind)[:60])
    return parts


def _held(item: Mapping[str, Any], key: str, report: SkipReport | None) -> Picture | None:
    """The picture that a part holds itself; None where it stands for the record's next."""
    for name in _HELD:
        value = item.get(name)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if name == "base64" and isinstance(value, str) and value:
            value = {"bytes": value}
        if image_source(value) is not None and value != "":
            return picture(value, key, report)
    if item.get("type") != "image":
        raise BadSample("image: neither data, name nor address", key)
    return None


MESSAGES = Format(
    "messages",
    "messages with role and content",
    (*_TURNS, "images", "image", "id"),
    _recognise,
    read_messages,
    dialogues=True,
)
