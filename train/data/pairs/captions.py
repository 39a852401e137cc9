"""The captions of a pair: what training, indexing and retrieval read is the same, because it is read here.

A caption lies in a member ``txt`` (``text``, ``caption``, ``transcript`` …), or in a ``json`` under ``caption``
(``text``, ``title`` …). A list ``captions`` in the ``json`` holds more of them: training draws one for every position,
retrieval finds an image by any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..names import CAPTION_EXTENSIONS, CAPTION_KEYS, JSON_EXTENSIONS
from ..report import BadSample
from ..text import mend_text

if TYPE_CHECKING:
    from ..report import SkipReport
    from ..shards.reader import Record

MAX_METADATA = 16 << 20
METADATA = "unreadable metadata, not used"


def described(record: Record, report: SkipReport | None = None) -> dict[str, Any]:
    """The ``json`` of a pair, each key also in small letters; empty where there is none.

    Broken, huge or deep metadata are noted and not used.
    """
    for extension in JSON_EXTENSIONS:
        data = record.members.get(extension)
        if data is None:
            continue
        try:
            if len(data) > MAX_METADATA:
                raise BadSample("broken JSON", record.name, f"{len(data)} bytes")
            content = record.json(extension)
        except BadSample as bad:
            if report is not None:
                report.note(METADATA, record.name, bad.detail)
            continue
        if isinstance(content, list):
            return {"captions": content}
        if isinstance(content, dict):
            return {**{key.casefold(): value for key, value in content.items()}, **content}
    return {}


def read_captions(record: Record, report: SkipReport | None = None) -> list[str]:
    """The different captions of a pair, white space made single; what had to be mended is noted in ``report``.

    Raises:
        BadSample: none that says anything.
    """
    texts: list[Any] = [record.text(e) for e in CAPTION_EXTENSIONS if e in record.members][:1]
    content = described(record, report)
    more = next((content[key] for key in ("captions", "sentences") if isinstance(content.get(key), list)), [])
    texts += [text.get("raw") if isinstance(text, dict) else text for text in more]
    if not texts:
        texts = [content.get(key) for key in CAPTION_KEYS if isinstance(content.get(key), str)][:1]
    captions = clean_captions(texts, record.name, report)
    if not captions:
        raise BadSample("empty caption", record.name)
    return captions


def clean_captions(texts: list[Any], name: str, report: SkipReport | None = None) -> list[str]:
    """Texts without doubles, empties and what is no text, white space made single, characters mended and noted."""
    cleaned = []
    for text in texts:
        if not isinstance(text, str):
            continue
        mended, what = mend_text(text)
        for reason in what if report is not None else ():
            report.note(reason, name)  # type: ignore[union-attr]
        cleaned.append(" ".join(mended.split()))
    return list(dict.fromkeys(filter(None, cleaned)))
