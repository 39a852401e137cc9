"""Images to normalised tensors, by the steps that ``preprocessor_config.json`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import MAX_PIXELS, ImageInput, as_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class GroupViTImageProcessor:
    """Settings and steps of image preprocessing, by the names Transformers gives them.

    Args:
        size: ``{"shortest_edge": pixels}`` keeps the aspect ratio, ``{"height": h, "width": w}`` does not.
        resample: number of a Pillow filter (2 bilinear, 3 bicubic).
        crop_size: ``{"height": h, "width": w}`` around the centre; smaller images are padded with black.
        image_mean, image_std: a channel each, of pixels after rescaling.
    """

    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"shortest_edge": 224})
    resample: int = 3
    do_center_crop: bool = True
    crop_size: dict[str, int] = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    do_convert_rgb: bool = True

    def __post_init__(self) -> None:
        # Early files give one number.
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        self.image_mean = tuple(self.image_mean)
        self.image_std = tuple(self.image_std)

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Images to float32 [B, channels, H, W].

        Args:
            images: one or several of: Pillow image; path of a file; array or tensor [H, W, 3] or [3, H, W],
                integers in 0..255, or floats in 0..1 or 0..255. :mod:`~...pictures` says how they become RGB.

        Raises:
            ValueError: something is no image, or has a wrong shape, or images come out in different sizes.
        """
        single = isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", 0) == 3
        batch: Any = [images] if single else images
        arrays = [self.normalize(self.crop(self.resize(as_rgb(image)))) for image in batch]
        if not arrays:
            raise ValueError("images is empty; give at least one image.")
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            sizes = ", ".join(f"{h}x{w}" for _, h, w in sorted(shapes))
            raise ValueError(f"images come out in different sizes ({sizes}); set a fixed size or crop_size.")
        return torch.from_numpy(np.stack(arrays))

    def resize(self, image: Image.Image) -> Image.Image:
        if not self.do_resize:
            return image
        width, height = image.size
        if "shortest_edge" in self.size:
            short = self.size["shortest_edge"]
            if width <= height:
                target = (short, int(short * height / width))
            else:
                target = (int(short * width / height), short)
        else:
            target = (self.size["width"], self.size["height"])
        if target[0] * target[1] > MAX_PIXELS:
            raise ValueError(
                f"an image of {width} × {height} pixels would be scaled to {target[0]} × {target[1]}; give one "
                "that is less narrow, or a smaller size."
            )
        return image.resize(target, Image.Resampling(self.resample))

    def crop(self, image: Image.Image) -> np.ndarray:
        """Centre crop to uint8 [H, W, channels]."""
        array = np.asarray(image)
        if not self.do_center_crop:
            return array
        height, width = array.shape[:2]
        crop_height, crop_width = self.crop_size["height"], self.crop_size["width"]
        if height < crop_height or width < crop_width:
            full_height, full_width = max(height, crop_height), max(width, crop_width)
            # Odd padding goes before the image, as in Transformers.
            top, left = -((height - full_height) // 2), -((width - full_width) // 2)
            padded = np.zeros((full_height, full_width, array.shape[2]), dtype=array.dtype)
            padded[top : top + height, left : left + width] = array
            array, height, width = padded, full_height, full_width
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return array[top : top + crop_height, left : left + crop_width]

    def normalize(self, array: np.ndarray) -> np.ndarray:
        """uint8 [H, W, channels] to float32 [channels, H, W]."""
        out = array.astype(np.float32)
        if self.do_rescale:
            out *= np.float32(self.rescale_factor)
        if self.do_normalize:
            out = (out - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        return np.ascontiguousarray(out.transpose(2, 0, 1))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {item.name for item in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known and value is not None})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "image_mean": list(self.image_mean), "image_std": list(self.image_std)}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        values = {
            **self.to_dict(),
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
        }
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (root / "preprocessor_config.json").write_text(text, encoding="utf-8")
