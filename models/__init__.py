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
from .idefics import (
    GenerationConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsModel,
    IdeficsPerceiverConfig,
    IdeficsProcessor,
    IdeficsVisionConfig,
)

__all__ = [
    "GenerationConfig",
    "GroupViTConfig",
    "GroupViTModel",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsVisionConfig",
]
