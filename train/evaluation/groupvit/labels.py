"""Class names: the lists that come with the product, or a text file of one's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ...data.text import read_text_file

_SUFFIXES = {".txt", ".csv", ".tsv", ".json", ".list", ".names"}
BUILT_IN = ("voc", "context", "coco_object", "imagenet")


def read_labels(source: str | Path) -> list[str]:
    """Names of the classes in order, from a built-in list or a file with one a line.

    Empty lines and lines that begin with ``#`` are left out.

    Args:
        source: one of ``voc``, ``context``, ``coco_object``, ``imagenet``, or the path of a text file.

    Raises:
        FileNotFoundError: there is no such list or file.
        ValueError: the file is no text or holds no names.
    """
    if str(source) in BUILT_IN:
        text = (files("interloom.train.evaluation.groupvit") / f"{source}.txt").read_text(encoding="utf-8")
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(
                f"the label file {source} does not exist; give a text file with one name a line, or one of "
                f"{', '.join(BUILT_IN)}."
            )
        text = read_text_file(path, "label file")
    lines = (line.strip() for line in text.splitlines())
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError(f"the label file {source} holds no names; write one a line.")
    return names


def split_labels(text: str) -> list[str]:
    """Names of ``--labels``: ``cat,dog``, or a built-in list, or the path of a text file.

    Raises:
        FileNotFoundError: it is shaped like a path, and there is no such file.
        ValueError: it names nothing.
    """
    looks_like_file = Path(text).suffix in _SUFFIXES or "/" in text or Path(text).is_file()
    if looks_like_file or text in BUILT_IN:
        return [name for name in read_labels(text) if name != "background"]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("labels is empty; give names such as 'cat,dog', or a text file with one a line.")
    return list(dict.fromkeys(names))
