"""Captioned pictures in the published files of COCO and Flickr30k.

    COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy    {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, COCO's or Flickr30k's
    Flickr30k   lines "NAME.jpg#0<TAB>caption"

Which of them a file is follows from its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .annotation_files import PictureFolder, choose_file, need, read_json
from .few_shot import Sample

_LINES = (".token", ".txt", ".tsv")
_KARPATHY = ("dataset_coco.json", "dataset_flickr30k.json", "dataset.json")


@dataclass(frozen=True)
class Captions:
    """Samples whose ``answers`` are all captions, with the ids under which captions are handed in."""

    samples: list[Sample]
    ids: list[int | str]


def find_captions(
    data: str | Path, split: str, annotations: str | None, images: str | None, seed: int
) -> Captions:
    """Read the captions of a split.

    Args:
        data: folder with the annotation file and, below it, the pictures; or the file.
        split: word in the name of COCO's file, or the split inside Karpathy's; Flickr30k's lines have none.
        annotations: the file itself, where ``data`` does not say it.
        images: folder of the pictures; ``data``'s otherwise.
        seed: which of its captions a picture shows as an example.

    Raises:
        FileNotFoundError, ValueError: files are missing, ambiguous, damaged or of another format.
    """
    root = Path(data)
    if not root.exists():
        raise FileNotFoundError(f"data={data} does not exist; give a folder with a file of captions.")
    folder = root if root.is_dir() else root.parent
    file = (
        root if annotations is None and root.is_file() else None if annotations is None else Path(annotations)
    )
    if file is None:
        file = next((root / name for name in _KARPATHY if (root / name).is_file()), None)
    if file is None:
        file = choose_file(root, split, ["caption"], [], "annotations")
    if file is None:
        lines = [path for path in sorted(root.iterdir()) if path.suffix == ".token"]
        file = lines[0] if len(lines) == 1 else None
    if file is None:
        raise ValueError(
            f"{root} holds no file of captions for split={split} (captions_{split}….json, dataset_….json or "
            "….token); give task.split=NAME or task.annotations=FILE."
        )
    return read_captions(file, split, PictureFolder(folder if images is None else images), seed)


def read_captions(path: Path, split: str, pictures: PictureFolder, seed: int = 0) -> Captions:
    """Read one data set.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged, of another format, or has no such split.
    """
    if path.suffix in _LINES:
        found = _lines(path, pictures)
    else:
        content = read_json(path)
        images = need(content, "images", list, str(path))
        if "annotations" in content:
            found = _coco(content, images, str(path), pictures)
        else:
            found = _karpathy(images, split, str(path), pictures)
    if not found:
        raise ValueError(f"{path} holds no captioned pictures.")
    samples = []
    for number, (key, image, captions) in enumerate(found):
        shown = (
            captions[int(np.random.default_rng([seed, number]).integers(len(captions)))] if captions else ""
        )
        samples.append(Sample(str(key), image, {}, tuple(captions), shown))
    return Captions(samples, [key for key, _, _ in found])


_Found = list[tuple[int | str, Path | None, Sequence[str]]]


def _coco(content: Any, images: list[Any], path: str, pictures: PictureFolder) -> _Found:
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
    return [(key, pictures.find(names[key]), texts) for key, texts in captions.items()]


def _karpathy(images: list[Any], split: str, path: str, pictures: PictureFolder) -> _Found:
    found: _Found = []
    splits = set()
    for number, entry in enumerate(images):
        where = f"{path}, image {number}"
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
        found.append((key, pictures.find(f"{folder}/{name}", name) if folder else pictures.find(name), texts))
    if not found:
        raise ValueError(
            f"{path} has no split {split!r}; it has {', '.join(sorted(splits))}, give task.split=NAME."
        )
    return found


def _lines(path: Path, pictures: PictureFolder) -> _Found:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of the data set's annotation file.")
    captions: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; download it again.") from error
    for number, line in enumerate(lines, 1):
        name, tab, text = line.partition("\t")
        image, mark, _ = name.rpartition("#")
        if not line.strip():
            continue
        if not tab or not mark or not text.strip():
            raise ValueError(f"{path}, line {number}: expected NAME.jpg#0, a tab and the caption.")
        captions.setdefault(image, []).append(text.strip())
    return [(name, pictures.find(name), texts) for name, texts in captions.items()]
