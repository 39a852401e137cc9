"""The models as plain modules, with the names, arguments and checkpoints users know."""

from typing import TYPE_CHECKING

from .lazy import lazy_exports

if TYPE_CHECKING:
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
    "GroupViTModel",
    "GroupViTProcessor",
    "GroupViTTextConfig",
    "GroupViTTextModel",
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
]

__getattr__ = lazy_exports(
    __name__, {name: ".groupvit" if name.startswith("GroupViT") else ".idefics" for name in __all__}
)
