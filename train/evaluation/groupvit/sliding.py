"""The published protocol of zero-shot segmentation (GroupViT, Xu et al., CVPR 2022, section 4 and its release).

The image is scaled to a short side of 448 and seen through windows of 448 that advance by 224. In each window

1. the soft maps of the grouping stages are multiplied, upsampled to pixels and hardened, so each pixel belongs
   to one group;
2. classes outside the window's five most likely are struck out; a group's score of the others is its softmax
   over them, times its softmax over all classes;
3. pixels whose best score is below min(threshold, best score in the window) are background.

Scores are averaged where windows overlap and resized to the image; the best class wins.

H, W image; h, w window; G groups; U classes without the background; P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel


@dataclass(frozen=True)
class Protocol:
    """Settings of the protocol; the defaults are those published for PASCAL VOC.

    Args:
        short_side: pixels that the short side is scaled to.
        long_side: pixels that the long side may not exceed, even if the short side gets smaller for it.
        window, stride: of the sliding window, in pixels.
        top_classes: classes kept a window.
        threshold: score below which a pixel is background; None for class lists without a background.
    """

    short_side: int = 448
    long_side: int = 2048
    window: int = 448
    stride: int = 224
    top_classes: int = 5
    threshold: float | None = 0.95

    def __post_init__(self) -> None:
        for name in ("short_side", "long_side", "window", "stride", "top_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} makes no sense; give a positive number.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} is no probability; give a number from 0 to 1.")


@torch.no_grad()
def segment_image(
    model: GroupViTModel,
    image: np.ndarray,
    classes: Tensor,
    protocol: Protocol,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Class of every pixel, int64 [H, W] on the CPU: 0 is background and classes count from 1.

    Without a background (``protocol.threshold`` None) classes count from 0. The arguments are those of
    :func:`score_image`.
    """
    return score_image(model, image, classes, protocol, mean, std).argmax(0).cpu()


@torch.no_grad()
def score_image(
    model: GroupViTModel,
    image: np.ndarray,
    classes: Tensor,
    protocol: Protocol,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Scores of every class at every pixel, [1 + U, H, W], the background first where there is one.

    Args:
        model: a GroupViT in evaluation mode.
        image: uint8 RGB [H, W, 3].
        classes: unit embeddings [U, P].
        protocol: see there.
        mean, std: [3] each, of pixels in 0..1.

    Raises:
        ValueError: ``image`` is not of that shape and type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"the image is {image.dtype} {list(image.shape)}; expected uint8 RGB [height, width, 3]."
        )
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(model.device, torch.float32)
    size = (image.shape[0], image.shape[1])
    target = scaled_size(size, protocol.short_side, protocol.long_side)
    pixels = F.interpolate(pixels, size=target, mode="bilinear", align_corners=False).round()
    pixels = (pixels / 255 - mean.to(pixels).view(3, 1, 1)) / std.to(pixels).view(3, 1, 1)
    total = torch.zeros(len(classes) + (protocol.threshold is not None), *target, device=pixels.device)
    seen = torch.zeros(target, device=pixels.device)
    for rows, columns in windows(target, protocol.window, protocol.stride):
        total[:, rows, columns] += window_scores(model, pixels[:, :, rows, columns], classes, protocol)
        seen[rows, columns] += 1
    scores = F.interpolate((total / seen)[None], size=size, mode="bilinear", align_corners=False)
    return scores[0]


def scaled_size(size: tuple[int, int], short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width with the short side at ``short_side``, unless the long one then exceeds ``long_side``."""
    scale = min(short_side / min(size), long_side / max(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def windows(size: tuple[int, int], window: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Windows that cover an image; the last of a row or column is moved back to lie inside."""

    def starts(length: int) -> list[int]:
        count = max(length - window + stride - 1, 0) // stride + 1
        return [max(min(i * stride + window, length) - window, 0) for i in range(count)]

    for top in starts(size[0]):
        for left in starts(size[1]):
            yield slice(top, min(top + window, size[0])), slice(left, min(left + window, size[1]))


@torch.no_grad()
def window_scores(model: GroupViTModel, pixels: Tensor, classes: Tensor, protocol: Protocol) -> Tensor:
    """Scores of one window: normalised pixels [1, 3, h, w] to [U, h, w], the background first if there is one."""
    from ....models.groupvit.grouping import grouping_maps

    height, width = pixels.shape[-2:]
    patch_height, patch_width = model.vision_model.embeddings.patch
    # Only images more than four times as long as high have windows that patches do not fill.
    pixels = F.pad(pixels, (0, -width % patch_width, 0, -height % patch_height))
    padded = (pixels.shape[-2], pixels.shape[-1])
    output = model.vision_model(pixels, output_attentions=True)
    maps = grouping_maps(output.attentions, (padded[0] // patch_height, padded[1] // patch_width), padded)
    group = maps[0, :, :height, :width].argmax(0)  # [h, w]

    classes = classes.to(pixels)
    scale = model.logit_scale.exp().clamp(max=100.0)
    groups = F.normalize(model.project_groups(output.last_hidden_state)[0], dim=-1)  # [G, P]
    whole = F.normalize(model.visual_projection(output.pooler_output)[0], dim=-1)  # [P]
    affinity = groups @ classes.T * scale  # [G, U]
    likely = (whole @ classes.T).topk(min(protocol.top_classes, len(classes))).indices
    kept = torch.full_like(affinity, float("-inf"))
    kept[:, likely] = affinity[:, likely]
    affinity = kept.softmax(-1) * affinity.softmax(-1)
    scores = affinity[group].permute(2, 0, 1)  # [U, h, w]
    if protocol.threshold is None:
        return scores
    threshold = affinity.max().clamp(max=protocol.threshold)
    background = (scores.amax(0) < threshold).to(scores.dtype)
    return torch.cat([background[None], scores])
