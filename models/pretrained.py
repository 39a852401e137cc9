"""``from_pretrained`` and ``save_pretrained`` for any model with a `ModelConfig`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .archives import check_layers
from .checkpoint import CheckpointFolder, HubOptions, Reader, load_into, save_folder
from .configuration import ModelConfig
from .received import blaming


class PretrainedModel(nn.Module):
    """Base of the public models.

    Subclasses set ``config_class`` and override the hooks `read_config`, `rename`, `optional` and
    ``weight_readers`` where their files differ from their modules.
    """

    config_class: ClassVar[type[ModelConfig]]
    weight_readers: ClassVar[Mapping[str, Reader]] = {}

    config: Any

    def __init__(self, config: Any):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} was given a {type(config).__name__}; "
                f"expected a {self.config_class.__name__}."
            )
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def read_config(cls, path: Path) -> Any:
        """Configuration for this class from a ``config.json``."""
        return cls.config_class.from_json_file(path)

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Name in a file to name in the module; None for weights that are known and not needed here."""
        return name

    @classmethod
    def optional(cls, name: str) -> bool:
        """Whether files may lack this weight."""
        return name.endswith("num_batches_tracked")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a folder in the format of Transformers, or a hub id, in evaluation mode.

        Args:
            path: a folder with ``config.json`` and weights, or ``owner/name`` on the hub.
            config: use this instead of the checkpoint's ``config.json``.
            dtype: floating-point type of the weights (``"bfloat16"`` works too); None or ``"auto"`` keeps
                the file's.
            device: where the weights go.
            revision, cache_dir, token, local_files_only: passed to ``huggingface_hub``.

        Raises:
            ValueError: there is no such checkpoint, it is of another model, it is damaged, or weights are
                unknown, missing or misshapen (listed).
        """
        hub = HubOptions(revision, cache_dir, token, local_files_only)
        folder = CheckpointFolder(path, hub)
        if config is None:
            config = cls.read_config(folder.require("config.json"))
        files = folder.weight_files(cls.weight_readers)
        check_layers(config, sum(file.stat().st_size for file, _ in files), folder.name)
        with torch.device("meta"), blaming(f"config.json of {folder.name}"):
            model = cls(config)
        load_into(
            model,
            (item for file, reader in files for item in reader(file)),
            source=folder.name,
            rename=cls.rename,
            optional=cls.optional,
            dtype=_dtype(dtype),
            device=device,
        )
        return model.eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write ``config.json`` and safetensors that Transformers loads too.

        Args:
            folder: made if missing; a checkpoint already there is replaced.
            state_dict: weights to write instead of this module's (gathered from shards, say).
            max_shard_size: above this the weights are split into several files with an index.
        """
        state = self.state_dict() if state_dict is None else state_dict
        dtype = str(next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32))
        save_folder(
            folder,
            state,
            self.config.to_json(architectures=[type(self).__name__], dtype=dtype.removeprefix("torch.")),
            max_shard_size=max_shard_size,
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating-point type of torch; use 'float32' or 'bfloat16'."
        )
    return found
