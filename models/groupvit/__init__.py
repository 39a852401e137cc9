"""GroupViT: segments from captions alone."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .configuration import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
    from .image_processing import GroupViTImageProcessor
    from .model import GroupViTModel, TFGroupViTModel
    from .output import GroupViTModelOutput
    from .processing import GroupViTProcessor
    from .text import GroupViTTextModel, TFGroupViTTextModel
    from .tokenizer import GroupViTTokenizer
    from .vision import GroupViTVisionModel, TFGroupViTVisionModel

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
    "TFGroupViTModel",
    "TFGroupViTTextModel",
    "TFGroupViTVisionModel",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "GroupViTConfig": ".configuration",
        "GroupViTImageProcessor": ".image_processing",
        "GroupViTModel": ".model",
        "GroupViTModelOutput": ".output",
        "GroupViTProcessor": ".processing",
        "GroupViTTextConfig": ".configuration",
        "GroupViTTextModel": ".text",
        "GroupViTTokenizer": ".tokenizer",
        "GroupViTVisionConfig": ".configuration",
        "GroupViTVisionModel": ".vision",
        "TFGroupViTModel": ".model",
        "TFGroupViTTextModel": ".text",
        "TFGroupViTVisionModel": ".vision",
    },
)
