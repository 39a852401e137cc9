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
        IdeficsConfig,
        IdeficsForVisionText2Text,
        IdeficsModel,
        IdeficsPerceiverConfig,
        IdeficsProcessor,
        IdeficsVisionConfig,
    )

__all__ = [
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

__getattr__ = lazy_exports(
    __name__, {name: ".groupvit" if name.startswith("GroupViT") else ".idefics" for name in __all__}
)
