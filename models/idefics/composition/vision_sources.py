"""Image towers to begin from: CLIP's, as the encoder of an IDEFICS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import CheckpointFolder, HubOptions
from ...received import blaming, read_settings
from ..configuration import IdeficsVisionConfig


@dataclass
class VisionTower:
    """An image tower that was found: its configuration, its weights by our names, its image processor's settings."""

    config: Any
    weights: Any
    image_processor: dict[str, Any]


def read_vision_tower(source: str | Path, hub: HubOptions | None = None) -> VisionTower:
    """Find a CLIP."""
    folder = CheckpointFolder(source, hub)
    values = read_settings(folder.require("config.json"))
    kind = values.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder.name} holds a {kind!r} model; an image tower is a clip.")
    with blaming(f"config.json of {folder.name}"):
        own = values.get("vision_config", values)
        known = {f.name for f in fields(IdeficsVisionConfig)} | {"hidden_size"}
        config = IdeficsVisionConfig.part_from_dict(
            {
                "hidden_act": "quick_gelu",
                "num_hidden_layers": 12,
                "patch_size": 32,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                **{k: v for k, v in own.items() if k in known},
            }
        )
    files = folder.weight_files()
    images: dict[str, Any] = {"image_size": config.image_size}
    if path := folder.find("preprocessor_config.json"):
        found = read_settings(path)
        images |= {
            k: found[k] for k in ("image_mean", "image_std", "resample", "rescale_factor") if k in found
        }
    return VisionTower(config, _weights(files), images)


def _weights(files: Any) -> Iterator[tuple[str, Tensor]]:
    for path, reader in files:
        for name, tensor in reader(path):
            name = name.removeprefix("vision_model.")
            if name.startswith(
                ("embeddings.", "pre_layrnorm", "encoder.", "post_layernorm")
            ) and not name.endswith("position_ids"):
                yield name, tensor
