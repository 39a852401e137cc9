"""COCO's and Karpathy's files of captions, for building pairs and for evaluation alike.

COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
Karpathy    {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, COCO's or Flickr30k's
"""

from __future__ import annotations

from typing import Any

CaptionedImage = tuple[int | str, tuple[str, ...], list[str]]
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


def need(entry: Any, key: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """``entry[key]`` of one of the ``kinds``; ``where`` names file and entry.

    Raises:
        ValueError: it is missing or of another kind.
    """
    expected = kinds if isinstance(kinds, tuple) else (kinds,)
    known = " or ".join(_KINDS.get(kind, kind.__name__) for kind in expected)
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {type(entry).__name__}, expected an object with {key!r} ({known}).")
    value = entry.get(key)
    if not isinstance(value, expected) or isinstance(value, bool):
        state = f"is {type(value).__name__}" if key in entry else "is missing"
        raise ValueError(f"{where}: {key!r} {state}, expected {known}; this file is of another format.")
    return value


def captioned_images(content: Any, split: str | None, path: str) -> list[CaptionedImage]:
    """(id, names to look for, the first first, captions) of every image of a file.

    Args:
        content: parsed JSON.
        split: the split inside Karpathy's file; None takes all. COCO's has none.

    Raises:
        ValueError: of another format, or without that split.
    """
    images = need(content, "images", list, path)
    if "annotations" in content:
        return _coco(content, images, path)
    return _karpathy(images, split, path)


def _coco(content: Any, images: list[Any], path: str) -> list[CaptionedImage]:
    captions: dict[Any, list[str]] = {}
    for number, entry in enumerate(images):
        key = need(entry, "id", (int, str), f"{path}, image {number}")
        if key in captions:
            raise ValueError(f"{path}, image {number}: id {key} occurs twice; each id may occur once.")
        captions[key] = []
    for number, entry in enumerate(need(content, "annotations", list, path)):
        where = f"{path}, annotation {number}"
        key = need(entry, "image_id", (int, str), where)
        if key not in captions:
            raise ValueError(f"{where}: image_id {key} is none of the file's images; download it again.")
        captions[key].append(need(entry, "caption", str, where))
    names = {
        entry["id"]: need(entry, "file_name", str, f"{path}, image {n}") for n, entry in enumerate(images)
    }
    return [(key, (names[key],), texts) for key, texts in captions.items()]


def _karpathy(images: list[Any], split: str | None, path: str) -> list[CaptionedImage]:
    found: list[CaptionedImage] = []
    splits = set()
    for number, entry in enumerate(images):
        where = f"{path}, image {number}"
        if split is not None:
            own = need(entry, "split", str, where)
            splits.add(own)
            # Karpathy's 30,000 "restval" pictures of COCO belong to what one trains on.
            if own != split and not (own == "restval" and split == "train"):
                continue
        name = need(entry, "filename", str, where)
        texts = [
            need(sentence, "raw", str, f"{where}, sentence {place}")
            for place, sentence in enumerate(need(entry, "sentences", list, where))
        ]
        key = entry.get("cocoid", entry.get("imgid", name))
        folder = str(entry.get("filepath") or "")
        found.append((key, (f"{folder}/{name}", name) if folder else (name,), texts))
    if not found and split is not None:
        raise ValueError(
            f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}, give task.split=NAME."
        )
    return found
