"""Pictures to the square, normalised tensors the image encoder takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..groupvit.images import CLIP_MEAN, CLIP_STD
from ..pictures import ImageInput, as_rgb


@dataclass
class IdeficsImageProcessor:
    """Settings and steps, by the names Transformers gives them.

    Args:
        image_size: pixels of a side; the aspect ratio is not kept.
        image_mean, image_std: a channel each, of values between 0 and 1.
        image_num_channels: 3.
        resample: number of a Pillow filter (3 bicubic).
    """

    image_size: int = 224
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    image_num_channels: int = 3
    resample: int = 3

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> Tensor:
        """Images to float32 [N, 3, image_size, image_size].

        Args:
            images: one or several of: Pillow image, path of a file, array or tensor [H, W, 3] or [3, H, W];
                :mod:`~...pictures` says how they become RGB.
            transform: used on each Pillow image instead of these steps (augmentation in training).

        Raises:
            ValueError: something is no image, or ``transform`` made tensors of different sizes.
        """
        if isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", 0) == 3:
            images = [images]  # pyright: ignore[reportAssignmentType]
        pictures = [as_rgb(image) for image in images]  # pyright: ignore[reportGeneralTypeIssues]
        if not pictures:
            raise ValueError("images is empty; give at least one image.")
        tensors = [transform(p) if transform is not None else self.preprocess(p) for p in pictures]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"transform made images of mixed sizes ({sorted(shapes)}); make them one size.")
        return torch.stack(tensors)

    def preprocess(self, image: Image.Image) -> Tensor:
        """One picture to float32 [3, image_size, image_size]."""
        size = (self.image_size, self.image_size)
        resized = image.resize(size, Image.Resampling(self.resample))
        array = np.asarray(resized, np.float32) * np.float32(1 / 255)
        array = (array - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Settings from ``preprocessor_config.json`` of any release."""
        names = ("image_size", "image_mean", "image_std", "image_num_channels", "resample")
        known = {name: values[name] for name in names if values.get(name) is not None}
        size = values.get("size")
        if "image_size" not in known and size is not None:
            known["image_size"] = size["height"] if isinstance(size, dict) else size
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        return {
            "image_processor_type": "IdeficsImageProcessor",
            "image_size": self.image_size,
            "size": {"height": self.image_size, "width": self.image_size},
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "image_num_channels": self.image_num_channels,
            "resample": self.resample,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``preprocessor_config.json``."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        values = {**self.to_dict(), "processor_class": "IdeficsProcessor"}
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (root / "preprocessor_config.json").write_text(text, encoding="utf-8")
