"""Documents a second, beside Transformers' ``IdeficsProcessor`` in a ``DataLoader``: ``interloom bench data``.

Both sides read the same shards of documents with three JPEGs each, with the same number of workers, and end
with ids, masks and normalised pixels of the same size. Theirs decodes with Pillow, since that is the backend
its processor falls back to without torchvision, and pads each batch to its longest document; ours packs.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...models.normalization import CLIP_MEAN, CLIP_STD
from ..data.documents.dataset import DocumentsConfig, DocumentsTransform, documents_loader
from ..data.documents.records import Document, Picture
from ..data.documents.tokenization import DocumentTokenizer
from ..data.drawn.documents import words, write_tokenizer
from ..data.shards.index import ALLOWED_EXTENSIONS
from ..data.shards.reader import ShardReader, ShardSet
from ..data.shards.writer import ShardWriter

IMAGES, WORDS = 3, 240


@contextmanager
def document_shards(documents: int, photos: list[bytes]) -> Iterator[Path]:
    """A folder with ``documents`` documents of :data:`WORDS` words around :data:`IMAGES` photos."""
    rng = np.random.default_rng(0)
    vocabulary = words()
    with tempfile.TemporaryDirectory(prefix="interloom-bench-") as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        tokenizer = DocumentTokenizer(folder / "tokenizer")
        with ShardWriter(
            folder / "shards",
            samples_per_shard=max(1, documents // 4),
            kind="documents",
            allowed=ALLOWED_EXTENSIONS,
            metadata={"tokenizer": tokenizer.sha256},
        ) as writer:
            for number in range(documents):
                parts: list[str | Picture] = []
                images = {}
                for place in range(IMAGES):
                    data = photos[(number * IMAGES + place) % len(photos)]
                    images[f"{place}.jpg"] = data
                    parts += [Picture(None), " ".join(rng.choice(vocabulary, WORDS // IMAGES))]
                ids, starts = tokenizer.encode(Document("", tuple(parts)))
                texts = [None if isinstance(part, Picture) else part for part in parts]
                content = {"ids": ids, "image_starts": starts, "texts": texts}
                writer.add(
                    f"{number:06d}",
                    {"json": json.dumps(content).encode(), **images},
                    tokens=len(ids),
                    images=IMAGES,
                    ragged={"image_start": starts},
                )
        yield folder


def image_backend() -> str:
    """The class that does the images of Transformers' processor here."""
    return type(_processor(None, 224).image_processor).__name__


def documents_sides(
    folder: Path, workers: int, size: int, batch_size: int
) -> dict[str, Callable[[], Iterator[int]]]:
    """Ours and theirs; each yields the number of documents of every batch."""
    return {
        "interloom": lambda: _interloom(folder, workers, size, batch_size),
        "IdeficsProcessor": lambda: _transformers(folder, workers, size, batch_size),
    }


def _interloom(folder: Path, workers: int, size: int, batch_size: int) -> Iterator[int]:
    config = DocumentsConfig(
        sources={"bench": [str(folder / "shards")]},
        tokenizer=str(folder / "tokenizer"),
        max_tokens=1024,
        max_images=4 * IMAGES,
        image_size=size,
        crop_scale=None,
        # A sequence holds about four documents of this length.
        batch_size=max(1, batch_size // 4),
        workers=workers,
    )
    begin = DocumentTokenizer(folder / "tokenizer").bos_id
    transform = DocumentsTransform(config)
    loader = documents_loader(config)
    size_of_epoch = len(loader.plan)
    for batch in loader:
        inside = batch["positions"] < size_of_epoch
        ready = transform(batch)
        yield int((ready["input_ids"][inside] == begin).sum())


class _Documents:
    """The same shards as (texts, encoded images), as people read them for ``IdeficsProcessor``."""

    def __init__(self, folder: Path) -> None:
        self.reader = ShardReader(ShardSet.open([str(folder / "shards")]), check=False)

    def __len__(self) -> int:
        return len(self.reader.shards)

    def __getitem__(self, number: int) -> list[Any]:
        from PIL import Image

        record = self.reader.read(number)
        prompt: list[Any] = []
        place = 0
        for text in record.json()["texts"]:
            if text is None:
                prompt.append(Image.open(io.BytesIO(record.members[f"{place}.jpg"])))
                place += 1
            else:
                prompt.append(text)
        return prompt


class _Collate:
    """Prompts to tensors, in the worker."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.processor = folder, size, None

    def __call__(self, prompts: list[list[Any]]) -> Any:
        if self.processor is None:
            self.processor = _processor(self.folder, self.size)
        batch = self.processor(text=prompts, padding="longest", return_tensors="pt")
        return dict(batch)


def _processor(folder: Path | None, size: int) -> Any:
    try:
        from transformers import IdeficsImageProcessor, IdeficsProcessor, PreTrainedTokenizerFast
    except ImportError:
        raise ValueError(
            "`interloom bench data --kind documents` compares with Transformers; install interloom[dev]"
        ) from None

    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            write_tokenizer(Path(made))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str((Path(made) if folder is None else folder / "tokenizer") / "tokenizer.json"),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
        )
    images = IdeficsImageProcessor(image_size=size, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    return IdeficsProcessor(image_processor=images, tokenizer=tokenizer)


def _transformers(folder: Path, workers: int, size: int, batch_size: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _Documents(folder),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_Collate(folder, size),
    )
    for batch in loader:
        yield len(batch["input_ids"])
