"""The models as plain modules, with the names, arguments and checkpoints users know."""

from .groupvit import (
    GroupViTConfig,
    GroupViTModel,
    GroupViTProcessor,
    GroupViTTextConfig,
    GroupViTTextModel,
    GroupViTVisionConfig,
    GroupViTVisionModel,
)

__all__ = [
    "GroupViTConfig",
    "GroupViTModel",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
]
