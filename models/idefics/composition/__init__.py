"""An IDEFICS from a language model and an image tower that were trained apart."""

from typing import TYPE_CHECKING

from ...lazy import lazy_exports

if TYPE_CHECKING:
    from .compose import ComposeOptions, Composition
    from .text_source import TextSource
    from .text_sources import read_text_source
    from .vision_sources import VisionTower, read_vision_tower

__all__ = [
    "ComposeOptions",
    "Composition",
    "TextSource",
    "VisionTower",
    "read_text_source",
    "read_vision_tower",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "ComposeOptions": ".compose",
        "Composition": ".compose",
        "TextSource": ".text_source",
        "VisionTower": ".vision_sources",
        "read_text_source": ".text_sources",
        "read_vision_tower": ".vision_sources",
    },
)
