"""Interleaved documents: from shards to the packed batches of IDEFICS training.

    config = DocumentsConfig(sources={"obelics": ["data/obelics"]}, tokenizer="data/tokenizer", batch_size=64)
    loader = documents_loader(config, seed=0, rank=0, world_size=1, max_steps=1000)
    transform = DocumentsTransform(config)
    for batch in loader:
        batch = transform(to_device(batch))

A batch of n sequences of T = ``max_tokens``, N = the most images of any (at least 1: every rank then runs the
vision tower in every step):

- ``input_ids`` int64 [n, T], padded; ``attention_mask`` int64 [n, T]
- ``document_ids`` int64 [n, T], number of the document within the row, -1 at padding
- ``position_ids`` int64 [n, T], from 0 in each document
- ``labels`` int64 [n, T], the ids; -100 at padding and at each document's first token, which nothing predicts
- ``pixel_values`` uint8 [n, N, 3, H, W]; float32 and normalised after the transform
- ``image_attention_mask`` bool [n, T, N], which images a token looks at, never one of another document
- ``image_valid`` bool [n, N], real images; ``source_ids`` int64 [n, T], which source, -1 at padding
- ``positions`` int64 [n], global positions; ``keys`` list of n strings; ``valid`` bool [n] in evaluation

An image that cannot be decoded is counted and named; its document keeps its text and other images, and the
tokens that would look at it look at nothing. A document that cannot be read leaves padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ....models.normalization import CLIP_MEAN, CLIP_STD
from ...messages import tell
from ..augment import normalise, uniforms
from ..decode import BICUBIC, MAX_PIXELS, Picture, check_filter, decode_box_into, random_box
from ..loader import PlanLoader, empty_batch
from ..order import mix
from ..report import BadSample
from ..shards.reader import Record, ShardReader, ShardSet
from ..shards.remote import RETRY_SECONDS
from .order import DocumentsPlan, ShardDocuments
from .packing import Piece
from .tokenization import DocumentTokenizer

ATTENTION = ("latest", "all_previous")
PREDICT = ("all", "answers")


@dataclass
class DocumentsConfig:
    """Documents for training and validation.

    Attributes:
        sources: name to folders, globs or URLs of shards for training.
        val: the same for validation.
        weights: name to share of tokens; empty reads every document once an epoch.
        tokenizer: folder of the tokenizer that the shards were made with.
        max_tokens, max_images: of one sequence.
        window_documents: documents packed together.
        image_size: side of the square images in pixels.
        predict: ``all`` tokens, or of dialogues the assistant's ``answers`` alone (pages are predicted whole).
        image_attention: ``latest``: a token looks at the last image before it; ``all_previous``: at all.
        crop_scale: area share of the random resized crop in training; None stretches the whole picture.
        batch_size, eval_batch_size: sequences of one optimiser step over all ranks.
        workers, prefetch: loader processes a rank, and batches that each prepares ahead.
        mean, std: of the normalisation; CLIP's.
        resample: number of the Pillow filter that scales pictures; 3 is bicubic.
        max_pixels: larger images are refused before decoding.
        max_skip_rate: images and documents lost per sequence before the run stops.
        retry_seconds: how long a server of remote shards is asked again before the run ends, to be requeued.
    """

    sources: dict[str, list[str]] = field(default_factory=dict)
    val: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    tokenizer: str = ""
    max_tokens: int = 1024
    max_images: int = 10
    window_documents: int = 8192
    image_size: int = 224
    predict: str = "all"
    image_attention: str = "latest"
    crop_scale: list[float] | None = field(default_factory=lambda: [0.9, 1.0])
    batch_size: int = 64
    eval_batch_size: int = 64
    workers: int = 8
    prefetch: int = 2
    shuffle: bool = True
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    resample: int = BICUBIC
    max_pixels: int = MAX_PIXELS
    max_skip_rate: float = 0.05
    retry_seconds: float = RETRY_SECONDS


class DocumentsFetch:
    """Batches of packed sequences from global positions; runs in the workers.

    Args:
        plan: order and packing.
        shards: each source's shards, in the plan's order.
        config: sizes.
        pad_id: token of padding.
        seed: of the run.
        train: random crops; else the whole picture.
    """

    def __init__(
        self,
        plan: DocumentsPlan,
        shards: Mapping[str, ShardSet],
        config: DocumentsConfig,
        *,
        pad_id: int,
        seed: int,
        train: bool,
    ) -> None:
        check_filter(config.resample)
        self.plan, self.config, self.pad_id, self.seed = plan, config, pad_id, seed
        self.readers = [ShardReader(part) for part in shards.values()]
        self.crop = tuple(config.crop_scale) if train and config.crop_scale else None

    def __call__(self, positions: np.ndarray) -> dict[str, Any]:
        config = self.config
        sequences = [self.plan.sequence(row) for row in self.plan.locate(positions)]
        rows, tokens = len(sequences), config.max_tokens
        images = max(1, *(sum(piece.num_images for *_, piece in pieces) for pieces in sequences))
        size = config.image_size
        batch: dict[str, Any] = {
            "input_ids": torch.full((rows, tokens), self.pad_id, dtype=torch.int64),
            "attention_mask": torch.zeros(rows, tokens, dtype=torch.int64),
            "document_ids": torch.full((rows, tokens), -1, dtype=torch.int64),
            "position_ids": torch.zeros(rows, tokens, dtype=torch.int64),
            "labels": torch.full((rows, tokens), -100, dtype=torch.int64),
            "source_ids": torch.full((rows, tokens), -1, dtype=torch.int64),
            "image_attention_mask": torch.zeros(rows, tokens, images, dtype=torch.bool),
            "image_valid": torch.zeros(rows, images, dtype=torch.bool),
            "pixel_values": empty_batch((rows, images, size, size, 3), torch.uint8).permute(0, 1, 4, 2, 3),
            "positions": torch.from_numpy(np.asarray(positions, np.int64)),
        }
        skipped: list[tuple[str, str, str]] = []
        keys = []
        for row, (position, pieces) in enumerate(zip(positions.tolist(), sequences, strict=True)):
            views = {name: value[row] for name, value in batch.items()}
            keys.append(self._fill(views, position, pieces, skipped))
        return {**batch, "keys": keys, "skipped": skipped}

    def _fill(
        self,
        row: dict[str, torch.Tensor],
        position: int,
        pieces: list[tuple[int, int, int, Piece]],
        skipped: list[tuple[str, str, str]],
    ) -> str:
        """Write one sequence; returns the names of its documents."""
        row["pixel_values"].zero_()
        count = max(1, sum(piece.num_images for *_, piece in pieces))
        draws = uniforms(self.seed, np.array([position]), "crop", count, 10, 4)[0] if self.crop else None
        token = image = 0
        names = []
        for document, (source, shard, sample, piece) in enumerate(pieces):
            reader = self.readers[source]
            damaged: list[BadSample] = []
            try:
                record = reader.read(int(reader.shards.starts[shard]) + sample, bad=damaged)
                content = read_document(record)
                ids = content["ids"][piece.start : piece.end]
            except BadSample as bad:
                skipped.append((bad.reason, bad.name, bad.detail))
                continue
            names.append(record.name)
            end = token + len(ids)
            here = slice(token, end)
            row["input_ids"][here] = torch.tensor(ids)
            row["attention_mask"][here] = 1
            row["document_ids"][here] = document
            row["source_ids"][here] = source
            row["position_ids"][here] = torch.arange(len(ids))
            for first, last in self._predicted(content, piece):
                learnt = slice(token + first - piece.start, token + last - piece.start)
                row["labels"][learnt] = row["input_ids"][learnt]
            chosen = range(piece.first_image, piece.first_image + piece.num_images)
            starts = [content["image_starts"][number] - piece.start + token for number in chosen]
            for place, number in enumerate(chosen):
                out = row["pixel_values"][image + place]
                problem = self._decode(record, number, out, None if draws is None else draws[image + place])
                if problem is not None:
                    out.zero_()
                    # A member that failed its checksum is missing; the reader knows why.
                    why = next((bad for bad in damaged if bad.detail.startswith(f".{number}.")), problem)
                    skipped.append((why.reason, problem.name, why.detail))
                    continue
                row["image_valid"][image + place] = True
                # The image token itself, one past the opening one, is the first to look at the image.
                replaced = self.config.image_attention == "latest" and place + 1 < len(starts)
                until = starts[place + 1] + 1 if replaced else end
                row["image_attention_mask"][starts[place] + 1 : until, image + place] = True
            token, image = end, image + piece.num_images
        return " ".join(names)

    def _predicted(self, content: dict[str, Any], piece: Piece) -> Iterator[tuple[int, int]]:
        """The tokens ``start:end`` of a document that are labels in this piece; its first is predicted by nothing."""
        every = [(0, piece.end)]
        wanted = content.get("answers", every) if self.config.predict == "answers" else every
        for start, end in wanted:
            start, end = max(start, piece.start + 1), min(end, piece.end)
            if start < end:
                yield start, end

    def _decode(
        self, record: Record, number: int, out: torch.Tensor, uniform: np.ndarray | None
    ) -> BadSample | None:
        """Decode image ``number`` of a document into ``out`` [3, H, W]; what is wrong with it otherwise."""
        name = f"{record.name}.{number}"
        data = next((d for ext, d in record.members.items() if ext.split(".")[0] == str(number)), None)
        if data is None:
            return BadSample("image missing or damaged", name)
        try:
            picture = Picture(data, name, self.config.max_pixels)
            box = (0.0, 0.0, float(picture.height), float(picture.width))
            if uniform is not None and self.crop is not None:
                box = random_box(
                    picture.height, picture.width, uniform, (self.crop[0], self.crop[1]), (0.75, 4 / 3)
                )
            decode_box_into(picture, box, out, self.config.resample)
        except BadSample as bad:
            return bad
        return None


def read_document(record: Record) -> dict[str, Any]:
    """``ids``, ``image_starts`` and, of a dialogue, ``answers`` of a stored document.

    Raises:
        BadSample: the JSON member is missing or not that of a document.
    """
    content = record.json()
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("ids"), list)
        or not isinstance(content.get("image_starts"), list)
    ):
        raise BadSample("not a document", record.name, "expected JSON with ids and image_starts")
    answers = content.get("answers", [])
    if not isinstance(answers, list) or not all(
        isinstance(span, list) and len(span) == 2 and all(isinstance(place, int) for place in span)
        for span in answers
    ):
        raise BadSample("not a document", record.name, "expected pairs of numbers in answers")
    return content


def open_sources(
    sources: Mapping[str, list[str]],
    tokenizer: DocumentTokenizer,
    max_skip_rate: float,
    retry_seconds: float = RETRY_SECONDS,
) -> dict[str, ShardSet]:
    """Open every source and check that its shards were made with ``tokenizer``.

    Raises:
        ValueError, FileNotFoundError: nothing there, other data, or another tokenizer.
    """
    opened = {}
    for name, folders in sources.items():
        shards = ShardSet.open(
            list(folders), kind="documents", max_skip_rate=max_skip_rate, retry_seconds=retry_seconds
        )
        made_with = shards.index(0).header["metadata"].get("tokenizer")
        if made_with != tokenizer.sha256:
            raise ValueError(
                f"source {name!r} ({shards.describe()}) was tokenised with another tokenizer than "
                f"{tokenizer.path}; give the one it was made with, or convert it again with "
                "`interloom data documents SOURCE OUT --tokenizer DIR`"
            )
        opened[name] = shards
    return opened


def documents_loader(
    config: DocumentsConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    max_steps: int | None = None,
    split: str = "train",
) -> PlanLoader:
    """Loader of one rank; arguments as in :func:`~..pairs.pairs_loader`.

    Raises:
        ValueError, FileNotFoundError: no usable shards, or a config that does not fit them.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} given, expected 'train' or 'val'")
    train = split == "train"
    sources = config.sources if train else config.val
    if not sources:
        name = "sources" if train else "val"
        raise ValueError(f"data.{name} is empty, expected a name and its folders: +data.{name}.obelics=[DIR]")
    if config.image_attention not in ATTENTION:
        raise ValueError(
            f"data.image_attention={config.image_attention!r} given, expected one of {ATTENTION}"
        )
    if config.predict not in PREDICT:
        raise ValueError(f"data.predict={config.predict!r} given, expected one of {PREDICT}")
    tokenizer = DocumentTokenizer(config.tokenizer)
    shards = open_sources(sources, tokenizer, config.max_skip_rate, config.retry_seconds)
    plan = DocumentsPlan(
        {name: ShardDocuments(part) for name, part in shards.items()},
        weights=(config.weights or None) if train else None,
        max_tokens=config.max_tokens,
        max_images=config.max_images,
        window_documents=config.window_documents,
        seed=mix(seed, 0xD0C5),
        shuffle=train and config.shuffle,
        tokenizer=tokenizer.sha256,
    )
    found = plan.dialogues
    if train and config.predict == "answers" and not found["dialogues"]:
        raise ValueError(
            f"data.predict=answers given, but {', '.join(sources)} hold no dialogues; leave it out, or make shards of "
            "dialogues with `interloom data documents SOURCE OUT --format llava` (or messages)"
        )
    if rank == 0 and (found["shortened"] or found["left out"]):
        tell(
            f"of {found['dialogues']:,} dialogues {found['shortened']:,} are shortened to data.max_tokens="
            f"{config.max_tokens}, after their last whole answer; {found['left out']:,} whose first answer lies beyond "
            "it are left out"
        )
    batch = config.batch_size if train else -(-config.eval_batch_size // world_size) * world_size
    return PlanLoader(
        plan,
        DocumentsFetch(plan, shards, config, pad_id=tokenizer.pad_id, seed=seed, train=train),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        workers=config.workers,
        prefetch=config.prefetch,
        steps=max_steps,
        start_step=start_step,
        exact=not train,
        max_skip_rate=config.max_skip_rate,
    )


class DocumentsTransform:
    """Batch on a device: uint8 pixels to what the model takes."""

    def __init__(self, config: DocumentsConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with ``pixel_values`` float32 [n, N, 3, H, W], normalised; missing images are zero."""
        pixels = batch["pixel_values"]
        rows, images = pixels.shape[:2]
        flat = normalise(
            pixels.flatten(0, 1).float().div_(255).contiguous(), self.config.mean, self.config.std
        )
        flat = flat * batch["image_valid"].flatten()[:, None, None, None]
        return {**batch, "pixel_values": flat.unflatten(0, (rows, images))}
