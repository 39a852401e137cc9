"""Images to normalised tensors, by the steps that ``preprocessor_config.json`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import CheckpointFolder, HubOptions
from ..files import write_atomically
from ..inputs import BatchFeature, as_kind, check_return_tensors
from ..normalization import CLIP_MEAN, CLIP_STD
from ..pictures import MAX_PIXELS, ImageInput, as_rgb, check_side
from ..received import blaming, check_preprocessing, read_settings

# Options of Transformers' image processors that change nothing here: how an array is laid out is seen from its shape.
WITHOUT_EFFECT = frozenset(
    {"input_data_format", "device", "disable_grouping", "use_fast", "do_pad", "pad_size"}
)
# What stands beside the settings of pictures in their file and is written anew.
_WRITTEN_ANEW = frozenset({"image_processor_type", "feature_extractor_type", "processor_class"})


def settings_of(kind: type) -> set[str]:
    """Names of the settings that an image processor follows."""
    return {item.name for item in fields(kind)} - {"further"}


@dataclass
class GroupViTImageProcessor:
    """Settings and steps of image preprocessing, by the names Transformers gives them.

    Args:
        size: ``{"shortest_edge": pixels}`` keeps the aspect ratio, ``{"height": h, "width": w}`` does not.
        resample: number of a Pillow filter (2 bilinear, 3 bicubic).
        crop_size: ``{"height": h, "width": w}`` around the centre; smaller images are padded with black.
        image_mean, image_std: a channel each, of pixels after rescaling.
        further: what a file says beside these, kept and written back.
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
    further: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Early files give one number.
        if isinstance(self.size, int):
            self.size = {"shortest_edge": self.size}
        if isinstance(self.crop_size, int):
            self.crop_size = {"height": self.crop_size, "width": self.crop_size}
        for name in ("size", "crop_size"):
            sides = getattr(self, name)
            if not isinstance(sides, dict):
                raise ValueError(f"{name}={str(sides)[:80]!r} is no size; expected sides by name, in pixels.")
            for side, value in sides.items():
                if value is not None:
                    check_side(value, f"{name}.{side}")
        self.image_mean = tuple(self.image_mean)
        self.image_std = tuple(self.image_std)

    def __call__(self, images: Any, return_tensors: str | None = None, **settings: Any) -> BatchFeature:
        """``pixel_values`` of one image or several, as CLIP's processor gives them.

        Args:
            images: as `tensor` takes them.
            return_tensors: ``"pt"`` for a float32 tensor [B, channels, H, W], ``"np"`` for such an array, or None
                for a list of arrays [channels, H, W].
            settings: fields of this class, for this call alone; ``data_format="channels_first"`` is understood.

        Raises:
            ValueError: as `tensor`, or a setting is not known.
        """
        check_return_tensors(return_tensors)
        pixels = self.tensor(images, **settings)
        if return_tensors is None:
            return BatchFeature({"pixel_values": list(pixels.numpy())})
        return BatchFeature({"pixel_values": as_kind(pixels, return_tensors)})

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        """The call under its other name."""
        return self(images, **options)

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """A copy with some fields replaced; None leaves a field.

        Raises:
            ValueError: a setting is not known.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if given.pop("data_format", "channels_first") not in ("channels_first", "first"):
            raise ValueError("data_format='channels_first' alone is made, which is what the models take.")
        for name in WITHOUT_EFFECT & given.keys():
            del given[name]
        known = settings_of(type(self))
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"{type(self).__name__} does not know {', '.join(unknown)}; its settings are "
                f"{', '.join(sorted(known))}."
            )
        return replace(self, **given) if given else self

    def tensor(self, images: ImageInput | Sequence[ImageInput], **settings: Any) -> Tensor:
        """Images to float32 [B, channels, H, W].

        Args:
            images: one or several of: Pillow image; path of a file; array or tensor [H, W, 3] or [3, H, W],
                integers in 0..255, or floats in 0..1 or 0..255; or one array or tensor of several such.
                :mod:`~...pictures` says how they become RGB.
            settings: fields of this class, for this call alone.

        Raises:
            ValueError: something is no image, or has a wrong shape, images come out in different sizes, or a
                setting is not known.
        """
        steps = self.changed(settings)
        single = isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", 0) == 3
        batch: Any = [images] if single else images
        arrays = [steps.normalize(steps.crop(steps.resize(as_rgb(image)))) for image in batch]
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
        known = settings_of(cls)
        further = {key: value for key, value in values.items() if key not in known | _WRITTEN_ANEW}
        return cls(
            **{key: value for key, value in values.items() if key in known and value is not None},
            further=further,
        )

    def to_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return {**values.pop("further"), **values}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Read ``preprocessor_config.json`` of a checkpoint folder or a hub id.

        Args:
            path: a folder, or ``owner/name``.
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``; any other is a field
                that replaces the file's.

        Raises:
            ValueError: there is no such checkpoint, its file is missing or damaged, or a field is not known.
        """
        names = {item.name for item in fields(HubOptions)}
        hub = HubOptions(**{name: value for name, value in options.items() if name in names})
        return cls.from_folder(CheckpointFolder(path, hub)).changed(
            {name: value for name, value in options.items() if name not in names}
        )

    @classmethod
    def from_folder(cls, folder: CheckpointFolder) -> Self:
        """Read ``preprocessor_config.json``, or what newer releases of Transformers nest in the processor's file."""
        path = folder.find("preprocessor_config.json") or folder.find("processor_config.json")
        if path is None:
            raise ValueError(
                f"{folder.name} has no preprocessor_config.json; save the processor beside the model."
            )
        values = read_settings(path)
        with blaming(path):
            images = cls.from_dict(values.get("image_processor", values))
            size = images.size
            sides = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
            sides += [images.crop_size["height"], images.crop_size["width"]]
            check_preprocessing(path, sides, images.image_mean, images.image_std, images.resample)
        return images

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        values = {
            **self.to_dict(),
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
        }
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        write_atomically(root / "preprocessor_config.json", text)
