"""Pictures to the square, normalised tensors the image encoder takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import received
from ..checkpoint import CheckpointFolder, HubOptions
from ..files import write_atomically
from ..groupvit.image_processing import GroupViTImageProcessor
from ..inputs import as_kind, check_return_tensors
from ..normalization import CLIP_MEAN, CLIP_STD
from ..pictures import ImageInput, as_rgb, check_side
from ..received import blaming, check_preprocessing

# What stands beside the settings of pictures in their file and is written anew.
_OF_THE_PROCESSOR = frozenset(
    {
        "size", "image_processor_type", "feature_extractor_type", "processor_class", "image_processor",
        "add_end_of_utterance_token", "return_tensors",
    }
)  # fmt: skip


@dataclass
class IdeficsImageProcessor:
    """Settings and steps, by the names Transformers gives them.

    Args:
        image_size: pixels of a side of the result.
        shortest_edge: bring the shorter side to this many pixels, keeping the aspect ratio, and cut the result from
            the centre, as CLIP and DINOv2 do; None stretches the picture to a square, as IDEFICS does.
        image_mean, image_std: a channel each, of values between 0 and 1.
        image_num_channels: 3.
        resample: number of a Pillow filter (3 bicubic).
        do_resize, do_rescale, do_normalize: whether the step is done; ``rescale_factor`` is that of the pixels.
        return_tensors: what calls return that do not say: ``"pt"``, ``"np"``, or None for lists.
        further: what a file says beside these, kept and written back.
    """

    image_size: int = 224
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    image_num_channels: int = 3
    resample: int = 3
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    return_tensors: str | None = "pt"
    shortest_edge: int | None = None
    further: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_side(self.image_size, "image_size")
        if self.shortest_edge is not None:
            check_side(self.shortest_edge, "shortest_edge")
        check_return_tensors(self.return_tensors)
        if not isinstance(self.rescale_factor, int | float) or not math.isfinite(self.rescale_factor):
            raise ValueError(
                f"rescale_factor={str(self.rescale_factor)[:80]!r} is no number; 1/255 is usual."
            )
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={str(getattr(self, name))[:80]!r} is neither true nor false.")

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput],
        transform: Callable[[Image.Image], Tensor] | None = None,
        **settings: Any,
    ) -> Any:
        """Images to float32 [N, 3, image_size, image_size].

        Args:
            images: one or several of: Pillow image, path of a file, array or tensor [H, W, 3] or [3, H, W];
                :mod:`~...pictures` says how they become RGB.
            transform: used on each Pillow image instead of these steps (augmentation in training).
            settings: fields of this class, for this call alone; of them ``return_tensors`` may be None.

        Raises:
            ValueError: something is no image, ``transform`` made tensors of different sizes, or a setting is not
                known.
        """
        return_tensors = settings.pop("return_tensors", self.return_tensors)
        check_return_tensors(return_tensors)
        steps = self.changed(settings)
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

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """A copy with some fields replaced; None leaves a field.

        Raises:
            ValueError: a setting is not known.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        known = [f.name for f in fields(self) if f.name != "further"]
        if unknown := sorted(given.keys() - set(known)):
            raise ValueError(
                f"{type(self).__name__} does not know {', '.join(unknown)}; its settings are "
                f"{', '.join(known)}."
            )
        return replace(self, **given) if given else self

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
                "fetch=… (interloom.train.data.download has a guarded one)."
            )
        return as_rgb(images)

    def tensor(self, image: Image.Image) -> Tensor:
        """One picture to float32 [3, image_size, image_size]."""
        if self.shortest_edge is not None:
            return self._cropped(image, self.shortest_edge)
        if self.do_resize:
            image = image.resize((self.image_size, self.image_size), Image.Resampling(self.resample))
        array = np.asarray(image, np.float32)
        if self.do_rescale:
            array = array * np.float32(self.rescale_factor)
        if self.do_normalize:
            array = (array - np.asarray(self.image_mean, np.float32)) / np.asarray(self.image_std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))

    def _cropped(self, image: Image.Image, shortest_edge: int) -> Tensor:
        steps = GroupViTImageProcessor(
            do_resize=self.do_resize,
            size={"shortest_edge": shortest_edge},
            resample=self.resample,
            crop_size={"height": self.image_size, "width": self.image_size},
            do_rescale=self.do_rescale,
            rescale_factor=self.rescale_factor,
            do_normalize=self.do_normalize,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )
        return torch.from_numpy(steps.normalize(steps.crop(steps.resize(image))))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Read ``preprocessor_config.json`` of a checkpoint folder or a hub id.

        Args:
            options: the processor's for the hub, and fields of this class, which replace the file's.
        """
        hub = {f.name: options.pop(f.name) for f in fields(HubOptions) if f.name in options}
        return cls.from_dict(read_settings(CheckpointFolder(path, HubOptions(**hub)))).changed(options)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **changes: Any) -> Self:
        """Settings from ``preprocessor_config.json`` of any release, CLIP's included; ``changes`` replace some.

        Raises:
            ValueError: the file keeps the aspect ratio without cutting a square.
        """
        values = {**values, **changes}
        names = {f.name for f in fields(cls)} - {"return_tensors", "further"}
        known = {name: value for name, value in values.items() if name in names and value is not None}
        size, further = values.get("size"), values.keys() - names - _OF_THE_PROCESSOR
        kind = values.get("image_processor_type") or values.get("feature_extractor_type") or "Idefics"
        if isinstance(size, int) and values.get("do_center_crop") and "Idefics" not in str(kind):
            size = {"shortest_edge": size}  # as CLIP's first files say it
        if isinstance(size, dict) and size.get("shortest_edge") is not None:
            crop = values.get("crop_size")
            known.setdefault("shortest_edge", size["shortest_edge"])
            if crop is not None:
                known.setdefault("image_size", crop["height"] if isinstance(crop, dict) else crop)
            if "image_size" not in known or values.get("do_center_crop") is False:
                raise ValueError(
                    f"size={size} keeps the aspect ratio of pictures and nothing cuts them to a square, which the "
                    "model needs; set do_center_crop and crop_size, or a size of height and width."
                )
            further -= {"crop_size", "do_center_crop"}
        elif "image_size" not in known and size is not None:
            known["image_size"] = size["height"] if isinstance(size, dict) else size
        return cls(**known, further={name: values[name] for name in values if name in further})

    def to_dict(self) -> dict[str, Any]:
        square = {"height": self.image_size, "width": self.image_size}
        cut = {"size": {"shortest_edge": self.shortest_edge}, "crop_size": square, "do_center_crop": True}
        return {
            **self.further,
            "image_processor_type": "IdeficsImageProcessor",
            "image_size": self.image_size,
            **({"size": square} if self.shortest_edge is None else cut),
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "image_num_channels": self.image_num_channels,
            "resample": self.resample,
            "do_resize": self.do_resize,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
        }

    def to_json_string(self) -> str:
        """What ``preprocessor_config.json`` holds."""
        values = {**self.to_dict(), "processor_class": "IdeficsProcessor"}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        write_atomically(Path(json_file_path), self.to_json_string())

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Self:
        """Settings from a file that `to_json_file` or any release of Transformers wrote."""
        return cls.from_dict(received.read_settings(Path(json_file)))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write ``preprocessor_config.json``, whose path is returned in a list."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        self.to_json_file(root / "preprocessor_config.json")
        return [str(root / "preprocessor_config.json")]


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
