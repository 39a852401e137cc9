"""What all dialogues have in common, however they are written: turns, whose pictures stand where they were shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...report import BadSample, SkipReport
from ..records import Document, Picture, Turn, clean_text, image_source
from .format import listed, picture

IMAGE_MARK = "<image>"
UNSHOWN = "image that no text refers to"
_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip


@dataclass
class Said:
    """One turn as a record has it: pictures that a text marks are None until :func:`with_images` puts them in."""

    role: str
    parts: list[str | Picture | None]
    learn: bool = True


def role_of(name: Any, key: str) -> str:
    """``system``, ``user`` or ``assistant``.

    Raises:
        BadSample: another role, such as a tool's.
    """
    found = _ROLES.get(name.strip().casefold()) if isinstance(name, str) else None
    if found is None:
        raise BadSample("role that is neither system, user nor assistant", key, repr(name)[:60])
    return found


def marked(text: str) -> list[str | Picture | None]:
    """A text with ``<image>`` in it as its parts."""
    parts: list[str | Picture | None] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append(None)
        if piece:
            parts.append(piece)
    return parts


def pictures_of(value: Any, key: str, report: SkipReport | None) -> list[Picture]:
    """The pictures of a record's ``image`` or ``images``: one, or a list of them.

    Raises:
        BadSample: one of them is empty.
    """
    if image_source(value) is None or value == "":
        return []
    found = [picture(item, key, report) for item in (value if isinstance(value, list | tuple) else [value])]
    if any(item is None for item in found):
        raise BadSample("image: neither data, name nor address", key)
    return [item for item in found if item is not None]


def with_images(turns: Sequence[Said], images: Sequence[Picture], key: str) -> None:
    """Put the record's pictures where its texts mark them, in order.

    Raises:
        BadSample: there are more marks than pictures, or pictures that nothing marks.
    """
    marks = sum(part is None for turn in turns for part in turn.parts)
    if marks < len(images):
        raise BadSample(UNSHOWN, key, f"{len(images)} images, {marks} {IMAGE_MARK}")
    if marks > len(images):
        raise BadSample("text that refers to an image that is not there", key, f"{marks} of {len(images)}")
    left = iter(images)
    for turn in turns:
        turn.parts = [next(left) if part is None else part for part in turn.parts]


def dialogue(
    turns: Sequence[Said], key: str, report: SkipReport | None, about: Mapping[str, Any]
) -> Document:
    """The document of a dialogue, checked.

    Raises:
        BadSample: it is empty, begins with an answer, has none, or a turn says nothing.
    """
    if not turns:
        raise BadSample("empty conversation", key)
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        raise BadSample("empty conversation", key, "system turns alone")
    if spoken[0].role == "assistant":
        raise BadSample("answer before a question", key)
    if not any(turn.role == "assistant" for turn in spoken):
        raise BadSample("conversation without an answer", key)
    parts: list[str | Picture] = []
    places: list[int] = []
    for number, turn in enumerate(turns):
        told = [clean_text(part, key, report) if isinstance(part, str) else part for part in turn.parts]
        if not any(isinstance(part, Picture) or (part or "").strip() for part in told):
            raise BadSample("turn that says nothing", key, f"{turn.role}, turn {number}")
        if turn.role == "assistant" and any(isinstance(part, Picture) for part in told):
            raise BadSample("answer that shows an image", key, f"turn {number}")
        for part in told:
            if part is not None and part != "":
                parts.append(part)
                places.append(number)
    general = {name: about[name] for name in ("id", "url") if isinstance(about.get(name), str | int)}
    return Document(
        key,
        tuple(parts),
        clean_text(json.dumps(general, ensure_ascii=False), key, report) if general else "",
        tuple(Turn(turn.role, turn.learn) for turn in turns),
        tuple(places),
    )


def turns_of(record: Mapping[str, Any], names: Sequence[str], key: str = "") -> list[Any] | None:
    """The list of turns in the first of these fields that holds anything; some tables keep it as JSON text.

    Raises:
        BadSample: it is text and not JSON.
    """
    held = next((record[name] for name in names if record.get(name) is not None), None)
    if isinstance(held, str):
        try:
            held = json.loads(held)
        except (ValueError, RecursionError):
            raise BadSample("conversation is not JSON", key) from None
    return listed(held)


def has_turns(record: Mapping[str, Any], names: Sequence[str], field: str) -> bool:
    """Whether a record holds a list of turns that have ``field``."""
    try:
        turns = turns_of(record, names)
    except BadSample:
        return False
    return turns is not None and all(isinstance(turn, Mapping) and field in turn for turn in turns)
