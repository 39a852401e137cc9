"""The models as plain modules, with the names, arguments and checkpoints users know."""

from typing import TYPE_CHECKING

from .lazy import lazy_exports

if TYPE_CHECKING:
    from .groupvit import (
        GroupViTConfig,
        GroupViTImageProcessor,
        GroupViTModel,
        GroupViTProcessor,
        GroupViTTextConfig,
        GroupViTTextModel,
        GroupViTTokenizer,
        GroupViTVisionConfig,
        GroupViTVisionModel,
        TFGroupViTModel,
        TFGroupViTTextModel,
        TFGroupViTVisionModel,
    )
    from .idefics import (
        GenerationConfig,
        IdeficsConfig,
        IdeficsForVisionText2Text,
        IdeficsImageProcessor,
        IdeficsModel,
        IdeficsPerceiverConfig,
        IdeficsProcessor,
        IdeficsTokenizer,
        IdeficsVisionConfig,
    )

__all__ = [
    "GenerationConfig",
    "GroupViTConfig",
    "GroupViTImageProcessor",
    "GroupViTModel",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
    "GroupViTTokenizer",
    "GroupViTVisionConfig",
    "GroupViTVisionModel",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsTokenizer",
    "IdeficsVisionConfig",
    "TFGroupViTModel",
    "TFGroupViTTextModel",
    "TFGroupViTVisionModel",
]

__getattr__ = lazy_exports(
    __name__, {name: ".groupvit" if "GroupViT" in name else ".idefics" for name in __all__}
)
