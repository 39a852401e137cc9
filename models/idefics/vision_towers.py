"""The image tower that a configuration asks for."""

from __future__ import annotations

from .towers.configuration import (
    IdeficsDinov2Config,
    IdeficsGroupViTConfig,
    IdeficsSiglipConfig,
    VisionConfig,
)
from .towers.dinov2 import IdeficsDinov2Transformer
from .towers.groupvit import IdeficsGroupViTTransformer
from .towers.siglip import IdeficsSiglipTransformer
from .vision import IdeficsVisionTransformer

VisionTower = IdeficsVisionTransformer | IdeficsGroupViTTransformer


def build_vision_tower(config: VisionConfig) -> VisionTower:
    """A new tower; ``forward(pixel_values)`` gives ``last_hidden_state`` [N, ``config.num_tokens``, E]."""
    if isinstance(config, IdeficsGroupViTConfig):
        return IdeficsGroupViTTransformer(config)
    if isinstance(config, IdeficsDinov2Config):
        return IdeficsDinov2Transformer(config)
    if isinstance(config, IdeficsSiglipConfig):
        return IdeficsSiglipTransformer(config)
    return IdeficsVisionTransformer(config)
