"""Pictures to the square, normalised tensors the image encoder takes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import received
from ..checkpoint import CheckpointFolder, HubOptions
from ..files import write_atomically
from ..groupvit.images import CLIP_MEAN, CLIP_STD
from ..inputs import as_kind, check_return_tensors
from ..pictures import ImageInput, as_rgb, check_side
from ..received import blaming, check_preprocessing


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

    def __post_init__(self) -> None:
        check_side(self.image_size, "image_size")

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        transform: Callable[[Image.Image], Tensor] | None = None,
        return_tensors: str | None = "pt",
        **settings: Any,
    ) -> Any:
        """Images to float32 [N, 3, image_size, image_size].

        Args:
            images: one or several of: Pillow image, path of a file, array or tensor [H, W, 3] or [3, H, W];
                :mod:`~...pictures` says how they become RGB.
            transform: used on each Pillow image instead of these steps (augmentation in training).
            return_tensors: ``"pt"``, ``"np"``, or None for lists.
            settings: ``image_size``, ``image_mean``, ``image_std``, ``resample`` for this call alone.

        Raises:
            ValueError: something is no image, ``transform`` made tensors of different sizes, or a setting is not
                known.
        """
        check_return_tensors(return_tensors)
        given = {name: value for name, value in settings.items() if value is not None}
        if unknown := sorted(given.keys() - {f.name for f in fields(self)}):
            raise ValueError(
                f"{type(self).__name__} does not know {', '.join(unknown)}; its settings are "
                f"{', '.join(f.name for f in fields(self))}."
            )
        steps = replace(self, **given) if given else self
        if isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", 0) == 3:
            images = [images]  # pyright: ignore[reportAssignmentType]
        pictures = [as_rgb(image) for image in images]  # pyright: ignore[reportGeneralTypeIssues]
        if not pictures:
            raise ValueError("images is empty; give at least one image.")
        tensors = [transform(p) if transform is not None else steps.tensor(p) for p in pictures]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise ValueError(f"transform made images of mixed sizes ({sorted(shapes)}); make them one size.")
        return as_kind(torch.stack(tensors), return_tensors)

    def preprocess(self, images: ImageInput | Sequence[ImageInput], **options: Any) -> Any:
        """The call under its other name."""
        return self(images, **options)

    def fetch_images(self, images: Any) -> Any:
        """The picture behind a path, or a list of them for a list; web addresses are `IdeficsProcessor`'s to fetch.

        Raises:
            ValueError: one is an address, or cannot be read as an image.
        """
        if isinstance(images, list | tuple):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, str) and "://" in images:
            raise ValueError(
                f"{images} is an address, and nothing is fetched here; download it, or make IdeficsProcessor with "
                "fetch=… (interloom.train.data.fetch has a guarded one)."
            )
        return as_rgb(images)

    def tensor(self, image: Image.Image) -> Tensor:
        """One picture to float32 [3, image_size, image_size]."""
        size = (self.image_size, self.image_size)
        resized = image.resize(size, Image.Resampling(self.resample))
        array = np.asarray(resized, np.float32) * np.float32(1 / 255)
        array = (array - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub: Any) -> Self:
        """Read ``preprocessor_config.json`` of a checkpoint folder or a hub id; ``hub`` as the processor's."""
        return cls.from_dict(read_settings(CheckpointFolder(path, HubOptions(**hub))))

    @classmethod
    def from_dict(cls, values: dict[str, Any], **changes: Any) -> Self:
        """Settings from ``preprocessor_config.json`` of any release; ``changes`` replace some."""
        values = {**values, **changes}
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
        write_atomically(root / "preprocessor_config.json", text)


def read_settings(folder: CheckpointFolder) -> dict[str, Any]:
    """Content of ``preprocessor_config.json``, or of the file that newer releases of Transformers write instead.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = folder.find("preprocessor_config.json") or folder.find("processor_config.json")
    if file is None:
        raise ValueError(
            f"{folder.name} has no preprocessor_config.json; save the processor beside the model."
        )
    settings = received.read_settings(file)
    # Newer releases of Transformers nest the settings of images in those of the processor.
    with blaming(file):
        settings = {**settings, **settings.get("image_processor", {})}
        images = IdeficsImageProcessor.from_dict(settings)
        check_preprocessing(file, [images.image_size], images.image_mean, images.image_std, images.resample)
    return settings
