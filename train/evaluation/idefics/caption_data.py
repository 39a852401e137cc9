"""Captioned pictures in the published files of COCO and Flickr30k.

    COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    Karpathy    {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}, COCO's or Flickr30k's
    Flickr30k   lines "NAME.jpg#0<TAB>caption"; Kaggle's captions.txt and results.csv, with a header

Which of them a file is follows from its content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.pairs.caption_files import captioned_images
from ...data.pairs.cells import Columns
from ...data.pairs.text_tables import read_text_table
from ...data.report import BadSample
from .annotation_files import PictureFolder, choose_file, read_json
from .few_shot import Sample

_LINES = (".token", ".txt", ".tsv", ".csv")
_TABLES = ("captions.txt", "results.csv")
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
        tables = [root / name for name in _TABLES if (root / name).is_file()]
        lines = [path for path in sorted(root.iterdir()) if path.suffix == ".token"] or tables[:1]
        file = lines[0] if len(lines) == 1 else None
    if file is None:
        raise ValueError(
            f"{root} holds no file of captions for split={split} (captions_{split}….json, dataset_….json, "
            "….token or captions.txt); give task.split=NAME or task.annotations=FILE."
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
        found = [
            (key, pictures.find(*names), texts)
            for key, names, texts in captioned_images(content, split, str(path))
        ]
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


def _lines(path: Path, pictures: PictureFolder) -> _Found:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of the data set's annotation file.")
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(read_text_table(path, Columns()).rows, 1):
        if isinstance(row, BadSample) or not str(row[1]).strip():
            kind = (
                "NAME.jpg#0, a tab and the caption" if path.suffix == ".token" else "a picture and a caption"
            )
            raise ValueError(f"{path}, line {number}: expected {kind}.")
        captions.setdefault(str(row[0]), []).append(str(row[1]).strip())
    return [(name, pictures.find(name), texts) for name, texts in captions.items()]
