"""``interloom eval task=segmentation``: mean IoU of zero-shot segmentation by the published protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....models.normalization import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from ...checkpointing.load import load_groupvit
from ..progress import track
from .embeddings import class_embeddings, templates_named
from .metrics import confusion, segmentation_scores
from .segmentation_data import SegmentationData, open_segmentation
from .sliding import Protocol, segment_image

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel, GroupViTProcessor


def evaluate_segmentation(
    model: GroupViTModel,
    processor: GroupViTProcessor,
    scenes: SegmentationData,
    *,
    protocol: Protocol,
    templates: Sequence[str] = ("a photo of a {}.",),
    pixels: str = "processor",
    limit: int | None = None,
) -> dict[str, float]:
    """Segment every scene and score it.

    Args:
        model: a GroupViT in evaluation mode.
        processor: its tokenizer and pixel statistics.
        scenes: labelled images, ``background`` the first of their classes.
        protocol: see `Protocol`.
        templates: prompts around a class name; several are averaged.
        pixels: whose mean and standard deviation: ``processor``, ``imagenet`` (those the original trained
            with) or ``clip``.
        limit: take this many scenes only.

    Returns:
        ``segmentation/miou``, ``segmentation/pixel_accuracy``, ``segmentation/iou/<class>``,
        ``segmentation/images``.
    """
    mean, std = pixel_statistics(processor, pixels)
    names = [name for name in scenes.classes if name != "background"]
    classes = class_embeddings(model, processor, names, templates)
    counts = torch.zeros(len(scenes.classes), len(scenes.classes), dtype=torch.int64)
    total = len(scenes) if limit is None else min(limit, len(scenes))
    for index, scene in enumerate(track(scenes, "segmenting", total)):
        if index >= total:
            break
        predicted = segment_image(model, scene.image, classes, protocol, mean, std)
        counts += confusion(predicted, torch.from_numpy(scene.mask), len(scenes.classes))
    return {**segmentation_scores(counts, scenes.classes), "segmentation/images": float(total)}


def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    kind: str = "auto",
    split: str = "val",
    short_side: int | None = None,
    long_side: int = 2048,
    window: int | None = None,
    stride: int | None = None,
    top_classes: int = 5,
    threshold: float | None = None,
    templates: str = "simple",
    pixels: str = "processor",
    limit: int | None = None,
) -> dict[str, float]:
    """The task of ``conf/task/segmentation.yaml``, whose comments say what the options are.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the data is missing, damaged or of the wrong kind.
    """
    if data is None:
        raise ValueError("data is not set; give data=FOLDER of a segmentation data set.")
    scenes = open_segmentation(data, kind, split)
    chosen = templates_named(templates)
    model, processor = load_groupvit(checkpoint)
    protocol = default_protocol(model.config.vision_config.image_hw[0], scenes.threshold)
    given = {"short_side": short_side, "window": window, "stride": stride, "threshold": threshold}
    protocol = replace(
        protocol,
        long_side=long_side,
        top_classes=top_classes,
        **{name: value for name, value in given.items() if value is not None},
    )
    return evaluate_segmentation(
        model, processor, scenes, protocol=protocol, templates=chosen, pixels=pixels, limit=limit
    )


def default_protocol(image_size: int, threshold: float | None = 0.95) -> Protocol:
    """The published protocol for a model of the published size; others see images at their own size."""
    if image_size == 224:
        return Protocol(threshold=threshold)
    return Protocol(
        short_side=image_size, window=image_size, stride=max(image_size // 2, 1), threshold=threshold
    )


def pixel_statistics(processor: GroupViTProcessor, pixels: str = "processor") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of pixels in 0..1."""
    images = processor.image_processor
    known = {
        "processor": (images.image_mean, images.image_std),
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
        "clip": (CLIP_MEAN, CLIP_STD),
    }
    if pixels not in known:
        raise ValueError(f"pixels={pixels!r} is not known; use {', '.join(known)}.")
    mean, std = known[pixels]
    return torch.tensor(mean), torch.tensor(std)
