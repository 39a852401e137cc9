"""GroupViT: segments from captions alone."""

from .configuration import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from .model import GroupViTModel
from .output import GroupViTModelOutput
from .text import GroupViTTextModel
from .vision import GroupViTVisionModel

__all__ = [
    "GroupViTConfig",
    "GroupViTModel",
    "GroupViTModelOutput",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
]
