"""IDEFICS: a language model that reads images through gated cross-attention."""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .cache import IdeficsCache, StaticCache
    from .causal_lm import IdeficsCausalLMOutputWithPast, IdeficsForVisionText2Text
    from .configuration import (
        IdeficsConfig,
        IdeficsPerceiverConfig,
        IdeficsVisionConfig,
        idefics_9b_config,
        idefics_80b_config,
    )
    from .generation.generation_config import GenerationConfig
    from .image_mask import image_attention_mask
    from .image_processing import IdeficsImageProcessor
    from .modeling import IdeficsBaseModelOutputWithPast, IdeficsModel
    from .processing import IdeficsProcessor
    from .tokenizer import IdeficsTokenizer
    from .towers.configuration import (
        IdeficsDinov2Config,
        IdeficsDinov2WithRegistersConfig,
        IdeficsGroupViTConfig,
        IdeficsSiglipConfig,
    )

__all__ = [
    "GenerationConfig",
    "IdeficsBaseModelOutputWithPast",
    "IdeficsCache",
    "IdeficsCausalLMOutputWithPast",
    "IdeficsConfig",
    "IdeficsDinov2Config",
    "IdeficsDinov2WithRegistersConfig",
    "IdeficsForVisionText2Text",
    "IdeficsGroupViTConfig",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsSiglipConfig",
    "IdeficsTokenizer",
    "IdeficsVisionConfig",
    "StaticCache",
    "idefics_9b_config",
    "idefics_80b_config",
    "image_attention_mask",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "GenerationConfig": ".generation.generation_config",
        "IdeficsBaseModelOutputWithPast": ".modeling",
        "IdeficsCache": ".cache",
        "IdeficsCausalLMOutputWithPast": ".causal_lm",
        "IdeficsConfig": ".configuration",
        "IdeficsForVisionText2Text": ".causal_lm",
        "IdeficsImageProcessor": ".image_processing",
        "IdeficsModel": ".modeling",
        "IdeficsPerceiverConfig": ".configuration",
        "IdeficsProcessor": ".processing",
        "IdeficsTokenizer": ".tokenizer",
        "IdeficsSiglipConfig": ".towers.configuration",
        "IdeficsGroupViTConfig": ".towers.configuration",
        "IdeficsDinov2WithRegistersConfig": ".towers.configuration",
        "IdeficsDinov2Config": ".towers.configuration",
        "IdeficsVisionConfig": ".configuration",
        "StaticCache": ".cache",
        "idefics_80b_config": ".configuration",
        "idefics_9b_config": ".configuration",
        "image_attention_mask": ".image_mask",
    },
)
