"""mmc4: sentences of a page, and its images with the sentence that each was matched to.

Zhu et al., "Multimodal C4", 2023. A record holds ``text_list`` (sentences), ``image_info`` (a list of objects with
``image_name``, ``raw_url``, ``matched_text_index``, ``matched_sim``), ``url`` and ``similarity_matrix``. Copies with
the pictures inside add ``image_base64`` to each object; others hold their bytes, or have a folder of files called
``image_name``.

An image stands before its sentence, because a text refers to the image before it; several of one sentence in the order
of the list. Sentences without an image between them are joined by a space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...report import BadSample, SkipReport
from ..records import Document, Picture, clean_text, image_source
from .format import Format, listed, only_texts, picture

# Where an image lies, what is at hand before what is to be fetched.
_HELD = ("image_base64", "bytes", "image", "image_bytes")
_UNMATCHED = "image that no text refers to"


def _recognise(record: Mapping[str, Any]) -> bool:
    return listed(record.get("text_list")) is not None and "image_info" in record


def read_mmc4(record: Mapping[str, Any], key: str, report: SkipReport | None) -> Document:
    """Read a record; images whose sentence is not there are counted and left out.

    Raises:
        BadSample: ``text_list`` is no list of strings, or ``image_info`` no list of objects.
    """
    sentences, infos = listed(record.get("text_list")), record.get("image_info")
    if isinstance(infos, str):
        try:
            infos = json.loads(infos)
        except (ValueError, RecursionError):
            raise BadSample("image_info is not JSON", key) from None
    infos = [] if infos is None else listed(infos)
    if sentences is None or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadSample("no text_list of strings", key)
    if infos is None or not all(isinstance(info, Mapping) for info in infos):
        raise BadSample("no image_info list", key)
    before: dict[int, list[Picture]] = {}
    for number, info in enumerate(infos):
        place = info.get("matched_text_index")
        if (
            isinstance(place, float) and place.is_integer()
        ):  # tables without whole numbers that may be missing
            place = int(place)
        name = f"{key} image {number}"
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(sentences):
            _lose(report, _UNMATCHED, name, f"matched_text_index {place!r} of {len(sentences)} sentences")
            continue
        found = _picture(info, key, report)
        if found is None:
            _lose(report, "image: neither data, name nor address", name, "")
            continue
        before.setdefault(place, []).append(found)
    return Document(key, only_texts(_parts(sentences, before, key, report), key), _about(record, key, report))


def _lose(report: SkipReport | None, reason: str, name: str, detail: str) -> None:
    if report is not None:
        report.add(reason, name, detail)


def _picture(info: Mapping[str, Any], key: str, report: SkipReport | None) -> Picture | None:
    """The image's data; else the file of its name or its address, whichever can be had."""
    address, name = info.get("raw_url"), info.get("image_name")
    src = address if isinstance(address, str) and address else name
    for field in _HELD:
        if (held := image_source(info.get(field))) is not None and held != "":
            return picture(held, key, report, src)
    named = {"path": name, "url": address}
    choices = {kind: value for kind, value in named.items() if isinstance(value, str) and value}
    if not choices:
        return None
    return picture(choices if len(choices) > 1 else next(iter(choices.values())), key, report, src)


def _parts(
    sentences: list[str], before: Mapping[int, list[Picture]], key: str, report: SkipReport | None
) -> Iterator[str | Picture]:
    text: list[str] = []
    for number, sentence in enumerate(sentences):
        if number in before:
            if text:
                yield " ".join(text)
                text = []
            yield from before[number]
        if cleaned := clean_text(sentence, key, report).strip():
            text.append(cleaned)
    if text:
        yield " ".join(text)


def _about(record: Mapping[str, Any], key: str, report: SkipReport | None) -> str:
    url = record.get("url")
    return (
        json.dumps({"url": clean_text(url, key, report)}, ensure_ascii=False) if isinstance(url, str) else ""
    )


MMC4 = Format(
    "mmc4", "text_list and image_info", ("text_list", "image_info", "url"), _recognise, read_mmc4, pages=True
)
