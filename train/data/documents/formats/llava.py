"""LLaVA's and ShareGPT's JSON: ``conversations`` of ``{"from": "human" | "gpt", "value": …}``.

``<image>`` in a value stands for the next picture of the record's ``image`` (a path, or a list of them) or ``images``.
ShareGPT's ``system`` beside the conversation is its first turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...report import BadSample, SkipReport
from ..records import Document
from .dialogue import Said, dialogue, has_turns, marked, pictures_of, role_of, turns_of, with_images
from .format import Format

_TURNS = ("conversations", "conversation")


def _recognise(record: Mapping[str, Any]) -> bool:
    return has_turns(record, _TURNS, "from")


def read_llava(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a record.

    Raises:
        BadSample: what it holds is no dialogue, or its images are not those of its texts.
    """
    turns = turns_of(record, _TURNS, key)
    if turns is None:
        raise BadSample("no conversations list", key)
    if not turns:
        raise BadSample("empty conversation", key)
    said = []
    if isinstance(system := record.get("system"), str) and system.strip():
        said.append(Said("system", marked(system)))
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise BadSample("turn without from and value", key)
        said.append(Said(role_of(turn.get("from"), key), marked(turn["value"])))
    images = pictures_of(record.get("image"), key, report) or pictures_of(record.get("images"), key, report)
    with_images(said, images, key)
    return dialogue(said, key, report, record)


LLAVA = Format(
    "llava",
    "conversations with from and value",
    (*_TURNS, "image", "images", "system", "id"),
    _recognise,
    read_llava,
    dialogues=True,
)
