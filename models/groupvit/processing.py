"""Captions and images to the tensors the model takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..checkpoint import CheckpointFolder, HubOptions
from ..inputs import BatchFeature
from ..received import blaming, check_preprocessing, read_settings
from .images import GroupViTImageProcessor, ImageInput
from .tokenizer import GroupViTTokenizer


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
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> BatchFeature:
        """Make model inputs.

        Args:
            text: one caption or several.
            images: one image or several (see `GroupViTImageProcessor`).
            return_tensors: ``"pt"``, ``"np"``, or None for lists.
            padding: True or ``"longest"`` to the longest caption, ``"max_length"`` to ``max_length``, False
                not at all. Padding goes to the right.
            truncation: cut captions to ``max_length``, the end token kept.
            max_length: tokens a caption; None is what the tokenizer was made for (77).

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T] if there is text, ``pixel_values`` [B, channels, H, W]
            float32 if there are images.

        Raises:
            ValueError: neither is given, an option is not known, captions of unlike length are to be one
                tensor without padding, or something is no image.
        """
        if text is None and images is None:
            raise ValueError("the processor was given neither text nor images; pass at least one.")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not known; use 'pt', 'np' or None.")
        batch = BatchFeature()
        if text is not None:
            single = isinstance(text, str)
            texts = [text] if isinstance(text, str) else text
            rows = self.tokenizer.encode(texts, truncation=truncation, max_length=max_length)
            ids, mask = self._pad(rows, padding, max_length)
            for name, values in (("input_ids", ids), ("attention_mask", mask)):
                if return_tensors is None:
                    batch[name] = values[0] if single else values
                else:
                    batch[name] = _tensor(values, return_tensors)
        if images is not None:
            pixels = self.image_processor(images)
            batch["pixel_values"] = pixels if return_tensors == "pt" else pixels.numpy()
            if return_tensors is None:
                batch["pixel_values"] = list(batch["pixel_values"])
        return batch

    def batch_decode(self, ids: Any, *, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in ids]

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(
            ids.tolist() if hasattr(ids, "tolist") else ids, skip_special_tokens=skip_special_tokens
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read ``preprocessor_config.json`` and the tokenizer's files from a folder or a hub id.

        Raises:
            ValueError: there is no such checkpoint, or files are missing or damaged.
        """
        folder = CheckpointFolder(path, HubOptions(revision, cache_dir, token, local_files_only))
        settings_file = folder.find("preprocessor_config.json") or folder.find("processor_config.json")
        if settings_file is None:
            raise ValueError(
                f"{folder.name} has no preprocessor_config.json; save the processor beside the model."
            )
        settings = read_settings(settings_file)
        with blaming(settings_file):
            # Newer releases of Transformers nest the settings of images in those of the processor.
            images = GroupViTImageProcessor.from_dict(settings.get("image_processor", settings))
            size = images.size
            sides = [size["shortest_edge"]] if "shortest_edge" in size else [size["height"], size["width"]]
            sides += [images.crop_size["height"], images.crop_size["width"]]
            check_preprocessing(settings_file, sides, images.image_mean, images.image_std, images.resample)
        with blaming(f"the tokenizer of {folder.name}"):
            return cls(images, GroupViTTokenizer.from_files(folder.find, folder.name))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write both parts so that this class and Transformers read them."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _pad(
        self, rows: list[list[int]], padding: bool | str, max_length: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding={padding!r} is not known; use True, 'longest', 'max_length' or False.")
        length = 0
        if padding == "max_length":
            length = max_length or self.tokenizer.model_max_length
        elif padding in (True, "longest"):
            length = max((len(row) for row in rows), default=0)
        gaps = [max(length - len(row), 0) for row in rows]
        ids = [row + [self.tokenizer.pad_token_id] * gap for row, gap in zip(rows, gaps, strict=True)]
        return ids, [[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]


def _tensor(rows: list[list[int]], kind: str) -> Any:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("captions differ in length and cannot be one tensor; pass padding=True.")
    array = np.asarray(rows, dtype=np.int64)
    return torch.from_numpy(array) if kind == "pt" else array
