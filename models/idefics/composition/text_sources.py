"""Language models to begin from: what their folders say, as the text side of an ``IdeficsConfig``, and their weights.

Llama 1 to 3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5 and Qwen3 are one decoder with different settings. A folder of
Transformers is read here, a GGUF file by :mod:`~.gguf`. What a file says and this decoder cannot do is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint import CheckpointFolder, HubOptions, Reader
from ...foreign_settings import refused
from ...received import blaming, read_settings
from ..architecture import FULL, SLIDING
from ..generation.generation_config import FILE as GENERATION_FILE
from ..generation.generation_config import GenerationConfig
from ..rope import one_rope
from .text_source import TextSource
from .vocabulary import source_tokenizer

# What a ``config.json`` means where it is silent; LLaMA's, then what others change.
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 2048, "attention_bias": False,
    "mlp_bias": False, "sliding_window": None,
}  # fmt: skip
_QWEN = {
    **_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "sliding_window": 4096,
    "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {**_QWEN, "use_sliding_window": False, "max_window_layers": 28, "layer_types": None},
    "qwen3": {**_QWEN, "head_dim": 128, "use_sliding_window": False, "max_window_layers": 28, "layer_types": None},
}  # fmt: skip
# Keys that hold what is taken over elsewhere, or that act outside the model, whatever their names sound like.
_ELSEWHERE = frozenset(
    {
        "rope_theta", "rope_scaling", "rope_parameters", "attention_dropout", "use_cache", "model_type",
        "transformers_version", "architectures", "torch_dtype", "dtype", "pretraining_tp", "is_llama_config",
        "transformers.js_config", "_name_or_path",
    }
)  # fmt: skip
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
KNOWN = "llama (Llama 1 to 3, SmolLM2, TinyLlama), mistral, qwen2 (Qwen2.5 too) and qwen3"


def read_text_source(source: str | Path, hub: HubOptions | None = None) -> TextSource:
    """Find a language model; weights are read when they are asked for.

    Args:
        source: a folder as Transformers writes it, a hub id, a ``.gguf`` file or a folder with one of these alone.

    Raises:
        ValueError: there is none, its files are not whole, or it is none that this decoder can be.
    """
    if (file := _gguf_file(source)) is not None:
        from .gguf_file import read_gguf

        return read_gguf(file)
    folder = CheckpointFolder(source, hub)
    values = read_settings(folder.require("config.json"))
    with blaming(f"config.json of {folder.name}"):
        settings = text_settings(values, folder.name)
    files = folder.weight_files()
    generation = GenerationConfig()
    if path := folder.find(GENERATION_FILE):
        generation = GenerationConfig.from_file(path)
    tied = settings["tie_word_embeddings"]
    return TextSource(
        folder.name,
        settings,
        source_tokenizer(folder.find, folder.name, settings),
        lambda: _renamed(files, tied),
        generation,
        values.get("max_position_embeddings"),
        sum(path.stat().st_size for path, _ in files),
    )


def _gguf_file(source: str | Path) -> Path | None:
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give a GGUF file or a folder with config.json.")
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} GGUF files; give the path of one.")
    return found[0] if found else None


def text_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The text side of an ``IdeficsConfig`` from the ``config.json`` of a language model.

    Raises:
        ValueError: it is of another architecture, is quantised, or says what this decoder cannot do.
    """
    kind = values.get("model_type")
    if kind not in DEFAULTS:
        raise ValueError(f"{source} holds a {kind!r} model; a text source is one of {KNOWN}.")
    if values.get("quantization_config"):
        method = dict(values["quantization_config"]).get("quant_method", "some method")
        raise ValueError(
            f"{source} is quantised ({method}), which is not read; give its weights as they were trained, or a GGUF "
            "file."
        )
    own = DEFAULTS[kind]
    rest = {k: v for k, v in values.items() if k not in own and k not in _ELSEWHERE}
    if problems := refused(None, {"partial_rotary_factor": lambda _: (1.0,)}, rest):
        raise ValueError(f"{source} is a {kind} with {', '.join(problems)}; give a plain one.")
    found = {**own, **{k: v for k, v in values.items() if k in own}}
    length = found.pop("max_position_embeddings")
    settings = {**found, **_windows(found, kind), "rope_parameters": _rope(values, length)}
    for name in ("use_sliding_window", "max_window_layers"):
        settings.pop(name, None)
    bias = settings["attention_bias"]
    # Qwen2 has biases on queries, keys and values alone; LLaMA and Qwen3, where they have some, on the output as well.
    settings |= {"attention_bias": bias or kind == "qwen2", "attention_output_bias": bias}
    settings["text_qk_norms"] = kind == "qwen3"
    return settings


def _windows(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind in ("qwen2", "qwen3"):
        if not found["use_sliding_window"] or found["sliding_window"] is None:
            return {"sliding_window": None, "layer_types": None}
        layers, first = found["num_hidden_layers"], found["max_window_layers"]
        kinds = found["layer_types"] or [SLIDING if i >= first else FULL for i in range(layers)]
        return {"sliding_window": found["sliding_window"], "layer_types": kinds}
    return {"sliding_window": found["sliding_window"] or None, "layer_types": None}


def _rope(values: Mapping[str, Any], length: int) -> dict[str, Any] | None:
    """``rope_parameters`` from whichever keys hold them, with the trained length where a type needs it."""
    rope = {name: values[name] for name in _ROPE if values.get(name) is not None}
    one_rope(rope)
    found = dict(rope.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(
            f"rope_parameters differ between layers ({', '.join(found)}); one kind for all layers is expected."
        )
    if found.get("rope_type") == "dynamic":
        found["original_max_position_embeddings"] = length  # its growth begins at the model's own length
    elif found.get("rope_type") in ("llama3", "yarn"):
        found.setdefault(
            "original_max_position_embeddings", values.get("original_max_position_embeddings", length)
        )
    return {name: value for name, value in found.items() if value is not None} or None


def _renamed(files: list[tuple[Path, Reader]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights by our names, which are Transformers': a decoder saved without its head lacks the ``model.`` alone."""
    for path, reader in files:
        for name, tensor in reader(path):
            if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                continue
            yield name if name.startswith(("model.", "lm_head.")) else f"model.{name}", tensor
