"""What a folder of shards holds: documents, tokens, images, sizes, scripts and duplicates, as figures and as a picture.

Counts, tokens and images come from the indexes, and are those of all documents. Sizes, scripts and duplicate documents
need a look into the documents; of very large folders only evenly spread ones are looked at.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ....models.pictures import PictureError, open_picture
from ...files import open_atomically
from ..names import is_image
from ..pairs.captions import read_captions
from ..report import BadSample, SkipReport
from ..shards.reader import Record, ShardReader, ShardSet

LOOKED_AT = 100_000
_HAN = {"CJK": "HAN"}  # what Unicode's names call it


def statistics(
    folder: str | Path,
    *,
    limit: int = LOOKED_AT,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Figures of a folder of shards.

    Args:
        folder: or a glob, a tar, or an address, as training takes them.
        limit: documents that are looked into; 0 for all.
        progress: called with (documents looked into, of how many).

    Returns:
        ``documents``, ``dialogues``, ``tokens``, ``images`` and ``bytes`` in all; ``tokens_per_document`` and
        ``images_per_document`` with ``mean``, ``median``, ``p95``, ``max`` and a ``histogram`` (lower end to count);
        ``looked_at``; ``width`` and ``height`` of images in pixels likewise; ``scripts``, share of the letters;
        ``duplicates`` with ``documents`` and ``images``, how many repeat an earlier one; ``unreadable``.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: ``limit`` is below 0.
    """
    if limit < 0:
        raise ValueError(f"--documents {limit} given, expected a number from 0 (all)")
    shards = ShardSet.open([str(folder)])
    count = len(shards)
    tokens = shards.column("tokens", 0, count).astype(np.int64)
    images = shards.column("images", 0, count).astype(np.int64)
    figures: dict[str, Any] = {
        "documents": count,
        "dialogues": sum(shard.dialogues for shard in shards.shards),
        "tokens": int(tokens.sum()),
        "images": int(images.sum()),
        "bytes": sum(shard.bytes for shard in shards.shards),
        "tokens_per_document": spread(tokens),
        "images_per_document": spread(images, 1),
    }
    chosen = np.arange(count) if not limit or count <= limit else np.linspace(0, count - 1, limit).astype(int)
    looked = _Look(shards)
    for number, sample in enumerate(chosen.tolist(), 1):
        looked.at(sample)
        if number % 256 == 0 or number == len(chosen):
            progress(number, len(chosen))
    letters = sum(looked.scripts.values())
    figures |= {
        "looked_at": len(chosen),
        "width": spread(np.array(looked.widths, np.int64)),
        "height": spread(np.array(looked.heights, np.int64)),
        "scripts": {name: number / letters for name, number in looked.scripts.most_common()},
        "duplicates": {"documents": looked.again, "images": looked.images_again},
        "unreadable": looked.unreadable,
    }
    return figures


class _Look:
    """What looking into documents tells; those of pairs are read with their picture, for its size."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.pages = shards.shards[0].kind == "documents"
        json_alone = frozenset({"json"})
        self.reader = ShardReader(shards, allowed=json_alone) if self.pages else ShardReader(shards)
        self.widths: list[int] = []
        self.heights: list[int] = []
        self.scripts: Counter[str] = Counter()
        self.again = self.images_again = self.unreadable = 0
        self._seen: set[bytes] = set()
        self._images: set[tuple[int, int]] = set()

    def at(self, sample: int) -> None:
        """Take one document in."""
        try:
            record = self.reader.read(sample)
            texts, sizes = _page(record) if self.pages else _pair(record)
        except BadSample:
            self.unreadable += 1
            return
        for width, height in sizes:
            self.widths.append(width)
            self.heights.append(height)
        for text in texts:
            self.scripts.update(scripts_of(text))
        shard, row = (int(x[0]) for x in self.shards.locate(np.array([sample])))
        pictures = [
            (member.crc32, member.length)
            for member in self.shards.index(shard).members(row)
            if is_image(member.extension)
        ]
        digest = hashlib.blake2b(repr((texts, pictures)).encode("utf-8", "replace"), digest_size=16).digest()
        self.again += digest in self._seen
        self._seen.add(digest)
        for picture in pictures:
            self.images_again += picture in self._images
            self._images.add(picture)


def _page(record: Record) -> tuple[list[str], list[tuple[int, int]]]:
    content = record.json()
    texts, images = (
        (content.get("texts"), content.get("images")) if isinstance(content, dict) else (None, None)
    )
    if not isinstance(texts, list) or not isinstance(images, list):
        raise BadSample("not a document", record.name)
    sizes = [(image.get("width"), image.get("height")) for image in images if isinstance(image, dict)]
    return (
        [text for text in texts if isinstance(text, str)],
        [(w, h) for w, h in sizes if isinstance(w, int) and isinstance(h, int)],
    )


def _pair(record: Record) -> tuple[list[str], list[tuple[int, int]]]:
    sizes = []
    for extension, data in record.members.items():
        if is_image(extension):
            try:
                sizes.append(open_picture(bytes(data), record.name).size)
            except PictureError as error:
                raise BadSample(error.reason, record.name) from None
    return read_captions(record, SkipReport()), sizes


def spread(values: np.ndarray, bin_width: int | None = None) -> dict[str, Any]:
    """Mean, median, 95th percentile, maximum and a histogram of non-negative integers; empty for none.

    Args:
        values: int64 [n].
        bin_width: of the histogram; about thirty bins by default.
    """
    if not len(values):
        return {}
    width = bin_width or max(1, -(-int(values.max()) // 30))
    bins, counts = np.unique(values // width, return_counts=True)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "histogram": {int(start * width): int(number) for start, number in zip(bins, counts, strict=True)},
    }


def scripts_of(text: str) -> Counter[str]:
    """Letters of each script in a text (``LATIN``, ``CYRILLIC``, ``HAN`` …)."""
    found: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if name := _script(letter):
            found[name] += count
    return found


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """The first word of a letter's name in Unicode is its script."""
    if not letter.isalpha():
        return ""
    first = unicodedata.name(letter, "OTHER").split()[0].split("-")[0]
    return _HAN.get(first, first)


def draw_statistics(figures: dict[str, Any], path: str | Path) -> None:
    """Write a picture of :func:`statistics`: tokens, images, sizes and scripts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flatten()
    for axis, name, title in zip(
        axes,
        ("tokens_per_document", "images_per_document", "width"),
        ("tokens of a document", "images of a document", "width of an image, pixels"),
        strict=False,
    ):
        _bars(axis, figures[name].get("histogram", {}), title)
    scripts: Iterable[tuple[str, float]] = list(figures["scripts"].items())[:8]
    names = [name.capitalize() for name, _ in scripts]
    axes[3].barh(names, [100 * share for _, share in scripts], color="#54a24b")
    axes[3].invert_yaxis()
    axes[3].set(xlabel="scripts, % of the letters")
    figure.suptitle(
        f"{figures['documents']:,} documents, {figures['tokens']:,} tokens, {figures['images']:,} images",
        fontsize=10,
    )
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or "png")


def _bars(axis: Any, histogram: dict[int, int], title: str) -> None:
    starts = list(histogram)
    width = min((b - a for a, b in pairwise(starts)), default=1)
    axis.bar(
        starts,
        list(histogram.values()),
        width=0.9 * width,
        align="edge" if width > 1 else "center",
        color="#4c78a8",
    )
    axis.set(xlabel=title, ylabel="number")
