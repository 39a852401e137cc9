"""From a published OBELICS record to documents: parse, split, deduplicate, filter.

A record (Laurençon et al., "OBELICS", NeurIPS 2023, sections 3 and A.1) has two parallel lists ``images`` and
``texts`` with exactly one non-null entry a position; ``metadata`` is a JSON string of a list of the same
length (null at texts, an object with ``src`` and more at images), ``general_metadata`` a JSON string about
the page. A text may hold ``END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED``, where several pages were joined.

Pure functions of the record: nothing here reads files, fetches or tokenises.

What other people's exports hold besides: structs of nulls for "no image" (Parquet has no other), images as base64 or
data addresses, metadata that is decoded already, surrogates without their other half.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..report import BadSample, SkipReport

END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
# Of a page's metadata, and of an image's address.
MAX_METADATA, MAX_ADDRESS = 2**20, 8192
# How the reasons begin that are a choice of the filters or the format: what they name was read and is whole.
CHOSEN = (
    "image smaller than", "image larger than", "image aspect over", "document with ", "duplicate image",
    "image that no text refers to", "further captions", "further pictures",
)  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
# How pictures begin, in base64: JPEG, PNG, RIFF (WebP), GIF, BMP, TIFF of either order.
_ENCODED = ("/9j/", "iVBOR", "UklGR", "R0lGO", "Qk", "SUkq", "TU0A")


@dataclass(frozen=True)
class Picture:
    """An image of a document: where it came from, and its bytes once they are known.

    Attributes:
        source: what the record holds: bytes, a path, an address, or an encoded-image dict.
        src: address it was published at, the identity within a document; "" if unknown.
        width, height: pixels, 0 while unknown.
        extension: ``jpg``, ``png`` … once the bytes were looked at.
        data: encoded bytes; None if they could not be had (the document keeps everything else).
    """

    source: Any = field(repr=False)
    src: str = ""
    width: int = 0
    height: int = 0
    extension: str = ""
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Turn:
    """Who speaks in a dialogue, ``system``, ``user`` or ``assistant``, and whether the words may be learnt."""

    role: str
    learn: bool = True


@dataclass(frozen=True)
class Document:
    """One page or dialogue: its parts in reading order, texts and pictures.

    Attributes:
        turns: of a dialogue, in order; a page has none.
        places: of a dialogue, the number of the turn that each part belongs to.
    """

    key: str
    parts: tuple[str | Picture, ...]
    general_metadata: str = ""
    turns: tuple[Turn, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def pictures(self) -> list[Picture]:
        """Its images in order."""
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def words(self) -> int:
        """White-space separated words of all texts."""
        return sum(len(part.split()) for part in self.parts if isinstance(part, str))


@dataclass
class Filters:
    """The published filters; set a limit to None to lift it.

    Attributes:
        min_side, max_side: pixels of either side of an image, inclusive.
        max_aspect: longer side over shorter.
        min_images, max_images: of a document, counted after images were filtered.
        min_words, max_words: of a document.
    """

    min_side: int | None = 150
    max_side: int | None = 20_000
    max_aspect: float | None = 2.0
    min_images: int | None = 1
    max_images: int | None = 30
    min_words: int | None = 10
    max_words: int | None = 2_000

    @classmethod
    def none(cls) -> Filters:
        """Keep everything."""
        return cls(None, None, None, None, None, None, None)

    def picture(self, picture: Picture) -> str | None:
        """Why an image of known size is left out; None if it stays."""
        if not picture.width or not picture.height:
            return None
        short, long = sorted((picture.width, picture.height))
        if self.min_side is not None and short < self.min_side:
            return f"image smaller than {self.min_side} px"
        if self.max_side is not None and long > self.max_side:
            return f"image larger than {self.max_side} px"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return f"image aspect over {self.max_aspect:g}"
        return None

    def document(self, document: Document) -> str | None:
        """Why a document is dropped; None if it stays."""
        for name, count, low, high in (
            ("images", len(document.pictures), self.min_images, self.max_images),
            ("words", document.words, self.min_words, self.max_words),
        ):
            if low is not None and count < low:
                return f"document with fewer than {low} {name}"
            if high is not None and count > high:
                return f"document with more than {high} {name}"
        return None


def _decode(value: Any, name: str, key: str) -> Any:
    """Metadata columns are JSON strings; some exports hold the decoded value."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadSample(f"{name} is not JSON", key) from None


def clean_text(text: str, key: str, report: SkipReport | None) -> str:
    """The text with surrogates that lack their other half as U+FFFD, which are counted."""
    cleaned, count = _SURROGATE.subn("\N{REPLACEMENT CHARACTER}", text)
    if count and report is not None:
        report.note("lone surrogate read as U+FFFD", key, count=count)
    return cleaned


def image_source(image: Any) -> Any:
    """What a record holds for an image: None for a struct of nulls, bytes for base64."""
    if isinstance(image, Mapping):
        if all(value is None for value in image.values()):
            return None
        data = image.get("bytes")
        if isinstance(data, str) and data:
            return _from_base64(data)
        return dict(image)
    if isinstance(image, str) and (image[:5].lower() == "data:" or _is_base64(image)):
        return _from_base64(image)
    return image


def _is_base64(text: str) -> bool:
    return len(text) > 64 and text.lstrip().startswith(_ENCODED) and _BASE64.fullmatch(text) is not None


def _from_base64(text: str) -> bytes:
    """Bytes of base64, also of a data address; nothing where it is none."""
    head, comma, body = text.partition(",")
    try:
        return base64.b64decode(body if comma and head.lower().startswith("data:") else text)
    except (binascii.Error, ValueError):
        return b""


def parse_record(record: Mapping[str, Any], key: str, report: SkipReport | None = None) -> Document:
    """Read one record as it was published.

    Args:
        report: told of what was mended in it, or left out of it.

    Raises:
        BadSample: ``images`` and ``texts`` are not parallel lists with exactly one non-null a position, or
            the metadata does not fit them.
    """
    images, texts = record.get("images"), record.get("texts")
    if not isinstance(images, list | tuple) or not isinstance(texts, list | tuple):
        raise BadSample("no images or texts list", key)
    if len(images) != len(texts):
        raise BadSample("images and texts differ in length", key, f"{len(images)} and {len(texts)}")
    metadata = _decode(record.get("metadata"), "metadata", key)
    if metadata is None:
        metadata = [None] * len(images)
    if not isinstance(metadata, list) or len(metadata) != len(images):
        raise BadSample("metadata differs in length", key)
    parts: list[str | Picture] = []
    for position, (held, text, about) in enumerate(zip(images, texts, metadata, strict=True)):
        image = image_source(held)
        if (image is None) == (text is None):
            raise BadSample("not exactly one of image and text", key, f"position {position}")
        if text is not None:
            if not isinstance(text, str):
                raise BadSample("text is not a string", key, f"position {position}")
            parts.append(clean_text(text, key, report))
        else:
            src = about.get("src") if isinstance(about, Mapping) else None
            if not isinstance(src, str):
                src = image if isinstance(image, str) else ""
            parts.append(Picture(image, clean_text(src, key, report) if len(src) <= MAX_ADDRESS else ""))
    return Document(key, tuple(parts), _general(record.get("general_metadata"), key, report))


def _general(value: Any, key: str, report: SkipReport | None) -> str:
    """A page's metadata as JSON; "" where it is too much."""
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):
        text = None
    if text is None or len(text) > MAX_METADATA:
        if report is not None:
            report.note("general_metadata too large or too deep, left out", key)
        return ""
    return clean_text(text, key, report)


def split_document(document: Document) -> list[Document]:
    """Split at the end-of-document marker, which may stand anywhere in a text.

    Sub-documents are called ``key``, ``key-1``, ``key-2`` …; empty ones are left out.
    """
    if document.turns or not any(
        isinstance(part, str) and END_OF_DOCUMENT in part for part in document.parts
    ):
        return [document]
    pages: list[list[str | Picture]] = [[]]
    for part in document.parts:
        if isinstance(part, Picture):
            pages[-1].append(part)
            continue
        for number, text in enumerate(part.split(END_OF_DOCUMENT)):
            if number:
                pages.append([])
            if text.strip():
                pages[-1].append(text)
    filled = [page for page in pages if page]
    return [
        replace(document, key=document.key if number == 0 else f"{document.key}-{number}", parts=tuple(page))
        for number, page in enumerate(filled)
    ]


def deduplicate(document: Document, report: SkipReport) -> Document:
    """Keep the first image of each source within a document, and a later one where a text refers to it again.

    A text refers to the image before it. So a repeated image stays if a text follows, unless it stands beside itself.
    What somebody shows in a dialogue was shown on purpose, and stays.
    """
    if document.turns:
        return document
    seen: set[str] = set()
    kept: list[int] = []
    shown = ""
    for position, part in enumerate(document.parts):
        if isinstance(part, Picture):
            if part.src and part.src in seen:
                after = document.parts[position + 1 : position + 2]
                told = bool(after) and isinstance(after[0], str) and bool(after[0].strip())
                if not told or part.src == shown:
                    report.add("duplicate image", document.key)
                    continue
            seen.add(part.src)
            shown = part.src
        else:
            shown = ""
        kept.append(position)
    return _keep(document, kept)


def _keep(document: Document, kept: list[int]) -> Document:
    """The document with the parts at ``kept`` alone.

    Nothing stands between two texts of a prompt, so those that had an image between them, and lost it, get an empty
    line: their words would run together.
    """
    parts: list[str | Picture] = []
    for number, position in enumerate(kept):
        part = document.parts[position]
        last = parts[-1] if parts else None
        if isinstance(part, str) and isinstance(last, str) and position - kept[number - 1] > 1:
            ends, begins = last.strip(" "), part.strip(" ")
            if ends and begins and not ends[-1].isspace() and not begins[0].isspace():
                part = "\n\n" + begins
        parts.append(part)
    places = tuple(document.places[position] for position in kept) if document.turns else ()
    return replace(document, parts=tuple(parts), places=places)


def filter_document(document: Document, filters: Filters, report: SkipReport) -> Document | None:
    """Apply the filters to images, then to the document; None if it is dropped.

    An image that could not be had counts as present: its document keeps its text and other images.
    """
    places = []
    for position, part in enumerate(document.parts):
        if isinstance(part, Picture) and (reason := filters.picture(part)) is not None:
            report.add(reason, document.key)
            continue
        places.append(position)
    kept = _keep(document, places)
    if not kept.parts:
        report.add("empty document", document.key)
        return None
    if (reason := filters.document(kept)) is not None:
        report.add(reason, document.key)
        return None
    return kept


def drop_missing(document: Document) -> Document:
    """The document without the images whose bytes could not be had."""
    parts = document.parts
    return _keep(
        document, [n for n, p in enumerate(parts) if not isinstance(p, Picture) or p.data is not None]
    )
