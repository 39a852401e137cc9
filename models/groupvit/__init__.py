"""GroupViT: segments from captions alone."""

from .configuration import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from .images import GroupViTImageProcessor
from .model import GroupViTModel
from .output import GroupViTModelOutput
from .processing import GroupViTProcessor
from .text import GroupViTTextModel
from .tokenizer import GroupViTTokenizer
from .vision import GroupViTVisionModel

__all__ = [
    "GroupViTConfig",
    "GroupViTImageProcessor",
    "GroupViTModel",
    "GroupViTModelOutput",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTTokenizer",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
]
