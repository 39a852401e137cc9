"""``interloom eval task=retrieval``: find the caption of an image and the image of a caption among all held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...checkpointing.load import load_groupvit
from ...data.decode import decode_rgb
from ...data.pairs.captions import read_captions
from ...data.report import BadSample
from ...data.shards.reader import image_of
from ..progress import track
from .embeddings import text_embeddings
from .metrics import recall

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel, GroupViTProcessor
    from ...data.shards.reader import ShardReader, ShardSet


@torch.no_grad()
def evaluate_retrieval(
    model: GroupViTModel,
    processor: GroupViTProcessor,
    reader: ShardReader,
    samples: Sequence[int],
    *,
    batch_size: int = 64,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions over pairs of a shard set.

    A sample may carry several captions (:mod:`..data.captions`): an image is found by any of them and finds any of
    them. Captions that read the same are the same caption, for no model could tell them apart.

    Args:
        model: a GroupViT in evaluation mode.
        processor: its tokenizer and image settings.
        reader: of the shards.
        samples: ids of the pairs to rank among each other.
        batch_size: images at a time.

    Returns:
        ``retrieval/image_to_text_r1`` (r5, r10), ``retrieval/text_to_image_r1`` (r5, r10), the chance levels
        ``retrieval/chance_r1`` (r5, r10), ``retrieval/images`` and ``retrieval/captions``.

    Raises:
        ValueError: a sample lacks a caption or an image, or its image is broken.
    """
    captions: dict[str, int] = {}
    of_image: list[set[int]] = []
    parts = []
    starts = range(0, len(samples), batch_size)
    for start in track(starts, "embedding", len(starts)):
        images = []
        for sample in samples[start : start + batch_size]:
            image, texts = _pair(reader, sample)
            images.append(image)
            of_image.append({captions.setdefault(text, len(captions)) for text in texts})
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(model.device)
        parts.append(F.normalize(model.visual_projection(model.encode_image(pixels)), dim=-1))
    image_embeds = torch.cat(parts)
    text_embeds = F.normalize(text_embeddings(model, processor, list(captions)), dim=-1)
    similarity = (image_embeds @ text_embeds.T).cpu()
    of_text: list[set[int]] = [set() for _ in captions]
    for image, texts in enumerate(of_image):
        for text in texts:
            of_text[text].add(image)
    scores = {}
    for name, found in (
        ("image_to_text", recall(similarity, of_image)),
        ("text_to_image", recall(similarity.T, of_text)),
    ):
        scores |= {f"retrieval/{name}_r{k}": value for k, value in found.items()}
    scores |= {f"retrieval/chance_r{k}": min(k / len(samples), 1.0) for k in (1, 5, 10)}
    return {**scores, "retrieval/images": float(len(samples)), "retrieval/captions": float(len(captions))}


def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    split: str = "val",
    batch_size: int = 64,
    limit: int | None = None,
) -> dict[str, float]:
    """The task of ``conf/task/retrieval.yaml``, whose comments say what the options are.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the data is missing, damaged or of the wrong kind.
    """
    from ...data.shards.reader import ShardReader

    shards = open_pairs(data, split)
    model, processor = load_groupvit(checkpoint)
    count = len(shards) if limit is None else min(limit, len(shards))
    return evaluate_retrieval(model, processor, ShardReader(shards), range(count), batch_size=batch_size)


def open_pairs(data: str | None, split: str) -> ShardSet:
    """Shards of pairs in a folder, or in its folder ``split``."""
    from ...data.shards.reader import ShardSet

    if data is None:
        raise ValueError("data is not set; give data=FOLDER of shards with images and captions.")
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data={data} does not exist; give a folder of shards of pairs.")
    folder = root / split if (root / split).is_dir() else root
    shards = ShardSet.open([str(folder)], kind="pairs")
    if len(shards) == 0:
        raise ValueError(f"{folder} holds no pairs; build shards with `interloom data pairs`.")
    return shards


def _pair(reader: ShardReader, sample: int):
    """Image uint8 [H, W, 3] and captions of one sample."""
    try:
        record = reader.read(sample)
        captions = read_captions(record)
        return decode_rgb(image_of(record), record.name), captions
    except BadSample as error:
        raise ValueError(f"the sample {error}; restore or remove it.") from error
