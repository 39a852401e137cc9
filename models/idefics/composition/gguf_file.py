"""A language model in one GGUF file, as llama.cpp packs it: configuration, tokenizer and (dequantised) weights.

The package ``gguf`` reads the container and undoes the quantisation. What llama.cpp's conversion changed on the way is
changed back here: names, the order of rotary pairs in LLaMA's query and key rows, and Llama 3's stretched frequencies,
which a file holds as factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...received import blaming, check_regular
from ..generation.generation_config import GenerationConfig
from ..rope import frequencies
from .gguf_tokenizer import read_tokenizer_of
from .text_source import TextSource

# Architecture of a file to the kind of model; Mistral's files say llama.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SETTINGS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}  # fmt: skip
_UNDERSTOOD = frozenset(
    {
        *_SETTINGS, "context_length", "vocab_size", "attention.value_length", "attention.causal", "rope.freq_base",
        "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.finetuned", "tensor_data_layout",
    }
)  # fmt: skip
_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ROOTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1 and 3.3 stretch by 8, Llama 3.2 by 32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_gguf(path: Path) -> TextSource:
    """Find the language model of a GGUF file.

    Raises:
        ValueError: the package ``gguf`` is not installed, the file is damaged, or its model is none of
            :data:`ARCHITECTURES`.
    """
    check_regular(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"{path} is a GGUF file, which needs the package gguf; install interloom[gguf]."
        ) from None
    with blaming(path, "fetch it again"):
        try:
            file = GGUFReader(path)
        except Exception as error:  # the library raises a dozen kinds for files that are none
            raise ValueError(f"{path} is damaged or not a GGUF file ({error}); fetch it again.") from error
        said = {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}
        names = {tensor.name for tensor in file.tensors}
        settings = gguf_settings(said, names, path)
        if _ROPE_FACTORS in names:
            factors = next(tensor for tensor in file.tensors if tensor.name == _ROPE_FACTORS)
            settings["rope_parameters"] = _llama3(settings, torch.tensor(factors.data), path)
        settings["vocab_size"] = next(
            (int(t.shape[1]) for t in file.tensors if t.name == "token_embd.weight"), settings["vocab_size"]
        )
        tokenizer = read_tokenizer_of(said, settings, str(path))
    return TextSource(
        str(path),
        settings,
        tokenizer,
        lambda: _tensors(file, settings, said["general.architecture"], path),
        GenerationConfig(),
        said.get(f"{said['general.architecture']}.context_length"),
        path.stat().st_size * 8,  # in memory a quantised weight takes up to so many times its bytes
    )


def gguf_settings(said: dict[str, Any], names: set[str], path: Path) -> dict[str, Any]:
    """The text side of an ``IdeficsConfig`` from the keys and the names of tensors of a file.

    Raises:
        ValueError: the architecture is not known, or a key asks for what this decoder cannot do.
    """
    kind = said.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path} holds a {kind!r} model; GGUF files of {', '.join(ARCHITECTURES)} are read.")
    own = {
        name.removeprefix(f"{kind}."): value for name, value in said.items() if name.startswith(f"{kind}.")
    }
    if unknown := sorted(
        name for name, value in own.items() if name not in _UNDERSTOOD and value not in (0, 0.0)
    ):
        raise ValueError(f"{path} is a {kind} with {', '.join(unknown)}, which this decoder does not have.")
    missing = [name for name in list(_SETTINGS)[:4] if name not in own]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(f'{kind}.{name}' for name in missing)}; fetch it again.")
    settings = {ours: own[name] for name, ours in _SETTINGS.items() if own.get(name) is not None}
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_dim) != head_dim:
            raise ValueError(
                f"{path} has {kind}.{name}={own[name]} for heads of {head_dim}; they must be the same."
            )
    settings |= {
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "vocab_size": own.get("vocab_size", 0),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "attention_output_bias": "blk.0.attn_output.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        "text_qk_norms": "blk.0.attn_q_norm.weight" in names,
        "rope_parameters": _rope(own, kind, path),
    }
    for role in ("bos", "eos", "pad"):
        key = "padding" if role == "pad" else role
        settings[f"{role}_token_id"] = said.get(f"tokenizer.ggml.{key}_token_id")
    return settings


def _rope(own: dict[str, Any], kind: str, path: Path) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base", 10000.0))}
    scaling = own.get("rope.scaling.type", "none")
    if scaling in ("none", None):
        return rope
    if scaling not in ("linear", "yarn"):
        raise ValueError(f"{path} has {kind}.rope.scaling.type={scaling!r}; none, linear and yarn are known.")
    rope |= {"rope_type": scaling, "factor": float(own.get("rope.scaling.factor", 1.0))}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = int(
            own.get("rope.scaling.original_context_length") or own.get("context_length") or 0
        )
    return rope


def _llama3(settings: dict[str, Any], factors: Tensor, path: Path) -> dict[str, Any]:
    """The scaling of Llama 3 that gives these factors, by which a file's frequencies are divided [D / 2].

    Raises:
        ValueError: none of the released scalings does.
    """
    rope = {"rope_theta": settings["rope_parameters"]["rope_theta"]}
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    nowhere = torch.zeros(1, 1, dtype=torch.long)
    plain, _ = frequencies(rope, head_dim, nowhere)
    for factor in (8.0, 32.0, float(factors.max())):
        scaled = {**rope, **_LLAMA3, "rope_type": "llama3", "factor": factor}
        if torch.allclose(plain / frequencies(scaled, head_dim, nowhere)[0], factors.float(), rtol=1e-4):
            return scaled
    raise ValueError(
        f"{path} stretches its rotary positions by factors that are not Llama 3's ({_ROPE_FACTORS}); give the folder "
        "of Transformers, whose config.json says how."
    )


def _tensors(file: Any, settings: dict[str, Any], kind: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    groups = {
        "self_attn.q_proj": settings["num_attention_heads"],
        "self_attn.k_proj": settings.get("num_key_value_heads") or settings["num_attention_heads"],
    }
    for tensor in file.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        name, part = _renamed(tensor.name, path)
        with blaming(f"{path}: weight {tensor.name!r}", "fetch it again"):
            value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            if kind == "llama" and part in groups:
                value = _unpermuted(value, groups[part])
        if tensor.tensor_type.name in ("F16", "BF16"):
            value = value.to({"F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name])
        yield name, value


def _renamed(name: str, path: Path) -> tuple[str, str]:
    """Name of a weight in the model, and of its part of a layer."""
    stem, _, kind = name.rpartition(".")
    if stem in _ROOTS:
        return f"{_ROOTS[stem]}.{kind}", stem
    block, _, rest = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or rest not in _NAMES:
        raise ValueError(f"{path} holds a weight {name!r}, which this decoder does not have.")
    return f"model.layers.{block}.{_NAMES[rest]}.{kind}", _NAMES[rest]


def _unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Rows [H * D, …] of rotary pairs side by side to pairs half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
