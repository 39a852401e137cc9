"""What a language model may have that IDEFICS, as Transformers computes it, has not; and who may be told of it.

A file of ``model_type`` ``idefics`` is read by other programs, which know LLaMA's layers alone and pass over settings
that they do not know. So what goes beyond is written under a ``model_type`` of ours, and refused in theirs.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..foreign_settings import refused
from .rope import THETA

OWN_MODEL_TYPE = "interloom_idefics"
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT_EXTENSIONS = frozenset(
    {
        "rope_parameters", "num_key_value_heads", "head_dim", "attention_bias", "attention_output_bias", "mlp_bias",
        "text_qk_norms", "sliding_window", "layer_types",
    }
)  # fmt: skip
# The value of each in a LLaMA of the first release.
_PLAIN: Any = {
    "num_key_value_heads": lambda text: (text.num_attention_heads,),
    "head_dim": lambda text: (text.hidden_size // text.num_attention_heads,),
    "attention_bias": lambda text: (False,),
    "attention_output_bias": lambda text: (False,),
    "mlp_bias": lambda text: (False,),
    "text_qk_norms": lambda text: (False,),
    "sliding_window": lambda text: (None,),
}
# Keys and values of the decoder's layers, in the whole model and in the decoder alone.
_OF_KEYS = re.compile(r"(model\.)?layers\.\d+\.self_attn\.[kv]_proj\.")


def check_text(config: Any) -> None:
    """
    Raises:
        ValueError: heads, widths, windows or layers of an ``IdeficsConfig`` do not fit each other.
    """
    heads, grouped = config.num_attention_heads, config.num_key_value_heads
    for name in ("num_key_value_heads", "head_dim", "sliding_window"):
        value = config.stated(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"IdeficsConfig.{name} is {value!r}; give a positive integer.")
    if config.stated("head_dim") is None and config.hidden_size % (2 * heads):
        raise ValueError(
            f"hidden_size {config.hidden_size} does not split into num_attention_heads {heads} heads of an even width "
            "(rotary positions turn pairs); choose widths that divide, or give head_dim."
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim {config.head_dim} is odd; rotary positions turn pairs, so choose an even one."
        )
    if heads % grouped:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {grouped}; every head of keys must "
            "serve as many heads of queries."
        )
    kinds = config.layer_types
    if kinds is None:
        return
    config.layer_types = kinds = list(kinds)
    if unknown := sorted({str(kind) for kind in kinds} - {SLIDING, FULL}):
        raise ValueError(f"layer_types holds {', '.join(unknown)}; known are {SLIDING} and {FULL}.")
    if len(kinds) != config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(kinds)} layers of {config.num_hidden_layers}; name each once."
        )
    if SLIDING in kinds and config.sliding_window is None:
        raise ValueError(
            f"layer_types has {SLIDING} but sliding_window is not set; give the window's length."
        )
    if SLIDING not in kinds:
        config.sliding_window = config.layer_types = None
    elif FULL not in kinds:
        config.layer_types = None


def refuse_in_idefics(config: Any) -> None:
    """
    Raises:
        ValueError: a ``config.json`` of ``model_type`` ``idefics`` says what IDEFICS does not have.
    """
    stated = {name: config.stated(name) for name in _PLAIN}
    problems = refused(config, _PLAIN, stated)
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        problems.append(
            f"rope_parameters or rope_scaling with rope_type {rope['rope_type']!r} (it has 'default')"
        )
    if problems:
        raise ValueError(
            f"The configuration asks {type(config).__name__} for {', '.join(problems)}; the weights of another "
            "architecture would load and give wrong results. Give a checkpoint of this one, or, if its weights are "
            f"named as IDEFICS's, set model_type to {OWN_MODEL_TYPE!r}."
        )


def beyond_transformers(config: Any) -> list[str]:
    """What Transformers' IDEFICS has not, even if grouped heads are expanded, a phrase each."""
    found = []
    width = config.hidden_size // config.num_attention_heads
    if config.head_dim != width or config.hidden_size % config.num_attention_heads:
        found.append(
            f"head_dim of {config.head_dim} (there it is hidden_size / num_attention_heads = {width})"
        )
    rope = config.rope_parameters or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        found.append(f"rotary positions scaled by {kind!r} (releases before 5 scale none)")
    if config.rope_theta != THETA:
        found.append(
            f"rope_theta of {config.rope_theta:g} (releases before 5 take {THETA:g}, whatever is said)"
        )
    if config.attention_bias or config.attention_output_bias:
        found.append("biases of the attention")
    if config.mlp_bias:
        found.append("biases of the feed-forward layers")
    if config.text_qk_norms:
        found.append("norms of queries and keys in the self-attention")
    if config.sliding_window is not None:
        found.append(f"sliding window of {config.sliding_window} tokens")
    if config.num_hidden_layers % config.cross_layer_interval:
        found.append(
            f"gated block every {config.cross_layer_interval} of {config.num_hidden_layers} layers (the interval "
            "must divide them)"
        )
    if config.vision_config.model_type != "idefics_vision":
        found.append(f"image encoder of kind {config.vision_config.model_type!r}")
    return found


def beyond_idefics(config: Any) -> bool:
    """Whether a model is more than a ``config.json`` of ``model_type`` ``idefics`` can say."""
    return config.num_key_value_heads != config.num_attention_heads or bool(beyond_transformers(config))


def expand_heads(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A state dict in which every head of queries has its own keys and values: copies, so results are the same."""
    copies = config.num_attention_heads // config.num_key_value_heads
    if copies == 1:
        return state
    return {
        name: _copied(value, config.head_dim, copies) if _OF_KEYS.match(name) else value
        for name, value in state.items()
    }


def _copied(rows: Tensor, head_dim: int, copies: int) -> Tensor:
    """[H * D, …] -> [copies * H * D, …], each head's rows repeated in their place."""
    heads = rows.unflatten(0, (-1, head_dim))
    return heads.repeat_interleave(copies, 0).flatten(0, 1)
