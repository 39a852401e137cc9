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
from .modeling import IdeficsBaseModelOutputWithPast, IdeficsModel

__all__ = [
    "IdeficsBaseModelOutputWithPast",
    "IdeficsCache",
    "IdeficsCausalLMOutputWithPast",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsModel",
    "IdeficsPerceiverConfig",
    "IdeficsVisionConfig",
    "StaticCache",
    "idefics_9b_config",
    "idefics_80b_config",
]
