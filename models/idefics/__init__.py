"""IDEFICS: a language model that reads images through gated cross-attention."""

from .cache import IdeficsCache, StaticCache
from .causal_lm import IdeficsCausalLMOutputWithPast, IdeficsForVisionText2Text
from .configuration import (
    IdeficsConfig,
    IdeficsPerceiverConfig,
    IdeficsVisionConfig,
    idefics_9b_config,
    idefics_80b_config,
)
from .generation_config import GenerationConfig
from .image_mask import image_attention_mask
from .image_processing import IdeficsImageProcessor
from .modeling import IdeficsBaseModelOutputWithPast, IdeficsModel
from .processing import IdeficsProcessor
from .tokenizer import IdeficsTokenizer

__all__ = [
    "GenerationConfig",
    "IdeficsBaseModelOutputWithPast",
    "IdeficsCache",
    "IdeficsCausalLMOutputWithPast",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsProcessor",
    "IdeficsTokenizer",
    "IdeficsVisionConfig",
    "StaticCache",
    "idefics_9b_config",
    "idefics_80b_config",
    "image_attention_mask",
]
