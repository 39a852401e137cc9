"""Captions and images to the tensors the model takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Self

from PIL import Image

from ..checkpoint import CheckpointFolder, HubOptions
from ..inputs import BatchFeature, check_return_tensors
from ..received import blaming
from ..tokenizer import SETTINGS
from .image_processing import WITHOUT_EFFECT, GroupViTImageProcessor, ImageInput, settings_of
from .tokenizer import GroupViTTokenizer

_IMAGE_OPTIONS = settings_of(GroupViTImageProcessor) | WITHOUT_EFFECT | {"data_format"}
_TEXT_OPTIONS = set(inspect.signature(GroupViTTokenizer.__call__).parameters) - {"self", "text"}


class GroupViTProcessor:
    """Tokenizer and image preprocessing in one call."""

    def __init__(self, image_processor: GroupViTImageProcessor, tokenizer: GroupViTTokenizer):
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        return_tensors: str | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        images_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            text: one caption or several.
            images: one image or several (see `GroupViTImageProcessor`). The two may also stand the other way round.
            return_tensors: ``"pt"``, ``"np"``, or None for lists.
            text_kwargs, images_kwargs, common_kwargs: options by whom they are for.
            options: of `GroupViTTokenizer` (``padding``, ``truncation``, ``max_length``, …) and of
                `GroupViTImageProcessor` (``size``, ``do_center_crop``, …). Captions are not padded unless asked.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T] if there is text, ``pixel_values`` [B, channels, H, W]
            float32 if there are images.

        Raises:
            ValueError: neither is given, an option is not known, captions of unlike length are to be one
                tensor without padding, or something is no image.
        """
        if _is_image(text):
            text, images = images, text  # pyright: ignore[reportAssignmentType]
        if text is None and images is None:
            raise ValueError("the processor was given neither text nor images; pass at least one.")
        options |= dict(common_kwargs or {})
        return_tensors = options.pop("return_tensors", return_tensors)
        check_return_tensors(return_tensors)
        of_images = {name: options.pop(name) for name in list(options) if name in _IMAGE_OPTIONS}
        of_images |= dict(images_kwargs or {})
        options |= dict(text_kwargs or {})
        if unknown := sorted(options.keys() - _TEXT_OPTIONS):
            raise ValueError(
                f"the processor was given {', '.join(unknown)}, which it does not know; captions take "
                f"{', '.join(sorted(_TEXT_OPTIONS))}, images {', '.join(sorted(_IMAGE_OPTIONS))}."
            )
        batch = BatchFeature()
        if text is not None:
            told = {**self.tokenizer.of_calls, **options}
            batch.update(self.tokenizer(text, return_tensors=return_tensors, **told))
        if images is not None:
            batch.update(self.image_processor(images, **{"return_tensors": return_tensors, **of_images}))
        return batch

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Captions of rows of ids: `GroupViTTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The caption of ids: `GroupViTTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Read ``preprocessor_config.json`` and the tokenizer's files from a folder or a hub id.

        Args:
            path: a folder, or ``owner/name``.
            options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``; any other is a setting
                of the tokenizer (``padding_side``, … : ``models.tokenizer.SETTINGS``) or a field of the image
                processor, and replaces the file's.

        Raises:
            ValueError: there is no such checkpoint, files are missing or damaged, or an option is not known.
        """
        names = {item.name for item in fields(HubOptions)}
        hub = HubOptions(**{name: value for name, value in options.items() if name in names})
        of_text = {name: options.pop(name) for name in sorted(SETTINGS & options.keys())}
        folder = CheckpointFolder(path, hub)
        images = GroupViTImageProcessor.from_folder(folder).changed(
            {name: value for name, value in options.items() if name not in names}
        )
        with blaming(f"the tokenizer of {folder.name}"):
            return cls(images, GroupViTTokenizer.from_files(folder.find, folder.name, of_text))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write both parts so that this class and Transformers read them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _is_image(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and _is_image(value[0])
    return isinstance(value, Image.Image) or hasattr(value, "ndim")
