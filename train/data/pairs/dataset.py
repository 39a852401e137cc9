"""Image-caption pairs: from shards to the batches of contrastive training.

    config = PairsConfig(train=["data/cc3m"], batch_size=4096, workers=8)
    loader = pairs_loader(config, seed=0, rank=0, world_size=1, start_step=0, max_steps=1000)
    transform = PairsTransform(config, seed=0, train=True)
    for batch in loader:
        batch = transform(to_device(batch))

A batch, before the transform, with n the rank's share of the global batch:

- ``pixel_values`` uint8 [n, 3, H, W], channels last; after it float32, augmented and normalised
- ``captions`` list of n strings; ``nouns`` list of n lists of strings
- ``positions`` int64 [n], the global positions, contiguous: all randomness hangs on them
- ``keys`` list of n strings ``shard/key``; ``valid`` bool [n] in evaluation

A sample has one image, its captions where :mod:`.captions` looks for them, and its nouns in ``json``. Of several
captions training draws one for every position. A sample that cannot be used is counted, named and replaced by
the next good one of the plan; no other sample moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ....models.normalization import IMAGENET_MEAN, IMAGENET_STD
from ..augment import AugmentConfig, augment, erase, normalise, to_float, uniforms
from ..decode import BICUBIC, MAX_PIXELS, Picture, centre_box, check_filter, decode_box_into, random_box
from ..loader import PlanLoader, empty_batch, load_or_replace
from ..order import PairsPlan, mix
from ..report import BadSample
from ..shards.reader import Record, ShardReader, ShardSet, image_of
from ..shards.remote import RETRY_SECONDS
from .captions import described, read_captions


@dataclass
class PairsConfig:
    """Pairs for training and validation.

    Attributes:
        train: folders, globs or URLs of shards; several are joined.
        val: the same for held-out pairs, which ``callbacks.validation`` scores the model on.
        image_size: side of the square images in pixels.
        batch_size: samples of one optimiser step over all ranks.
        eval_batch_size: the same for validation.
        workers: loader processes a rank.
        prefetch: batches that each worker prepares ahead.
        shuffle: whether training data are shuffled, anew every epoch.
        augment: strength of training augmentation; None trains on centre crops.
        fit: how validation images become square: ``crop`` (short side to size, centre) or ``stretch``.
        mean, std: of the normalisation, per channel; ImageNet's by default, as GroupViT was trained.
        resample: number of the Pillow filter that scales pictures; 3 is bicubic.
        max_pixels: larger images are refused before decoding.
        max_skip_rate: share of samples that may be unusable before the run stops.
        retry_seconds: how long a server of remote shards is asked again before the run ends, to be requeued.
    """

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    image_size: int = 224
    batch_size: int = 4096
    eval_batch_size: int = 256
    workers: int = 8
    prefetch: int = 2
    shuffle: bool = True
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    fit: str = "crop"
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    resample: int = BICUBIC
    max_pixels: int = MAX_PIXELS
    max_skip_rate: float = 0.01
    retry_seconds: float = RETRY_SECONDS


@dataclass
class Pair:
    """Texts of one sample; its pixels are in the batch already."""

    name: str
    caption: str
    nouns: list[str]


class PairsFetch:
    """Batches of pairs from global positions; runs in the workers.

    Args:
        plan: order of the samples.
        config: sizes and crops.
        seed: of the run.
        train: random resized crops if augmentation is on; else the whole picture by ``config.fit``.

    Raises:
        ValueError: unknown ``fit``.
    """

    def __init__(self, plan: PairsPlan, config: PairsConfig, *, seed: int, train: bool) -> None:
        if config.fit not in ("crop", "stretch"):
            raise ValueError(f"data.fit={config.fit!r} given, expected 'crop' or 'stretch'")
        if config.image_size < 1:
            raise ValueError(f"data.image_size={config.image_size} given, expected at least 1")
        check_filter(config.resample)
        self.plan, self.config, self.seed = plan, config, seed
        self.crop, self.train = config.augment if train else None, train
        self.reader = ShardReader(plan.shards)

    def __call__(self, positions: np.ndarray) -> dict[str, Any]:
        size = self.config.image_size
        pixels = empty_batch((len(positions), size, size, 3), torch.uint8).permute(0, 3, 1, 2)
        draws = uniforms(self.seed, positions, "crop", 10, 4) if self.crop else None
        words = uniforms(self.seed, positions, "caption").tolist() if self.train else None
        records = self.reader.read_many(self.plan.locate(positions).tolist())
        pairs: list[Pair] = []
        skipped: list[tuple[str, str, str]] = []
        for row, (position, record) in enumerate(zip(positions.tolist(), records, strict=True)):
            load = partial(
                self._load,
                out=pixels[row],
                uniform=None if draws is None else draws[row],
                draw=words[row] if words else 0.0,
            )
            pairs.append(load_or_replace(self.plan, position, load, skipped, located=record))
        return {
            "pixel_values": pixels,
            "captions": [pair.caption for pair in pairs],
            "nouns": [pair.nouns for pair in pairs],
            "positions": torch.from_numpy(positions),
            "keys": [pair.name for pair in pairs],
            "skipped": skipped,
        }

    def _load(self, found: Any, out: torch.Tensor, uniform: np.ndarray | None, draw: float) -> Pair:
        if isinstance(found, BadSample):
            raise found
        record = found if isinstance(found, Record) else self.reader.read(int(found))
        pair = read_pair(record, draw)
        picture = Picture(image_of(record), record.name, self.config.max_pixels)
        height, width = picture.height, picture.width
        if uniform is not None and self.crop is not None:
            scale, ratio = self.crop.crop_scale, self.crop.crop_ratio
            box = random_box(height, width, uniform, (scale[0], scale[1]), (ratio[0], ratio[1]))
        elif self.config.fit == "crop":
            box = centre_box(height, width, 1.0)
        else:
            box = (0, 0, height, width)
        decode_box_into(picture, box, out, self.config.resample)
        return pair


def read_pair(record: Record, draw: float = 0.0) -> Pair:
    """Caption and nouns of a record; nouns in the index go before those in ``json``.

    Args:
        draw: which of several captions, as a number in [0, 1); 0 is the first.

    Raises:
        BadSample: no caption, or an empty one.
    """
    captions = read_captions(record)
    nouns = record.nouns if record.nouns is not None else described(record).get("nouns")
    nouns = [noun for noun in nouns if isinstance(noun, str) and noun] if isinstance(nouns, list) else []
    caption = captions[int(draw * len(captions))]
    return Pair(record.name, caption, nouns)


def pairs_loader(
    config: PairsConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    max_steps: int | None = None,
    split: str = "train",
) -> PlanLoader:
    """Loader of one rank.

    Args:
        config: what to load.
        seed: of the run.
        rank, world_size: which share is this loader's.
        start_step: first optimiser step to yield.
        max_steps: steps of the whole run and the loader's length; None for one epoch.
        split: ``train``, endless and augmented; or ``val``, each sample exactly once, in order.

    Raises:
        ValueError, FileNotFoundError: no usable shards, or a config that does not fit them.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} given, expected 'train' or 'val'")
    train = split == "train"
    sources = config.train if train else config.val
    if not sources:
        raise ValueError(
            f"data.{split} is empty, expected folders of shards, such as data.{split}=[data/{split}]"
        )
    shards = ShardSet.open(
        sources, kind="pairs", max_skip_rate=config.max_skip_rate, retry_seconds=config.retry_seconds
    )
    plan = PairsPlan(shards, seed=mix(seed, 0xDA7A), shuffle=train and config.shuffle)
    batch = config.batch_size if train else -(-config.eval_batch_size // world_size) * world_size
    return PlanLoader(
        plan,
        PairsFetch(plan, config, seed=seed, train=train),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        workers=config.workers,
        prefetch=config.prefetch,
        steps=max_steps,
        start_step=start_step,
        exact=not train,
        max_skip_rate=config.max_skip_rate,
        lost=shards.report,
    )


class PairsTransform:
    """Batch on a device: uint8 pixels to what the model takes.

    Args:
        config: augmentation and normalisation.
        seed: of the run.
        train: augment; otherwise normalise only.
        extra: operations after the augmentation, each from pixels float [n, 3, H, W] in [0, 1], positions int64 [n]
            and the seed to such pixels.
    """

    def __init__(
        self,
        config: PairsConfig,
        *,
        seed: int = 0,
        train: bool = True,
        extra: Sequence[Callable[..., torch.Tensor]] = (),
    ) -> None:
        self.config, self.seed = config, seed
        self.extra = tuple(extra) if train else ()
        self.augment = config.augment if train else None

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with ``pixel_values`` float32 [n, 3, H, W], contiguous, augmented and normalised."""
        pixels = batch["pixel_values"]
        if self.augment is not None:
            positions = batch["positions"].cpu().numpy()
            pixels = augment(to_float(pixels), positions, self.seed, self.augment)
            for operation in self.extra:
                pixels = operation(pixels, positions, self.seed)
        pixels = normalise(pixels, self.config.mean, self.config.std)
        if self.augment is not None and self.augment.erase:
            pixels = erase(pixels, positions, self.seed, self.augment.erase)
        return {**batch, "pixel_values": pixels}
