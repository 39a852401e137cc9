"""``generation_config.json``: how a checkpoint's makers meant its text to be generated.

    settings = GenerationConfig.from_pretrained("checkpoints/idefics-9b-instruct")
    model.generate(**inputs, generation_config=settings, num_beams=1)

What a call of ``generate`` says goes before ``generation_config=``, that before the model's own
(``model.generation_config``, read with its weights), that before the defaults.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ...files import write_atomically

FILE = "generation_config.json"

# Settings that ``generate`` follows, and what they are where nobody says.
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": None,
    "max_length": None,
    "min_new_tokens": 0,
    "min_length": 0,
    "max_time": None,
    "stop_strings": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
_NO_ASSISTANT = "there is no assisted decoding, whose results would be the same"
# Settings that ``generate`` does not follow, the values that ask for nothing, and what to know of the others.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_early_exit": ((), _NO_ASSISTANT),
    "assistant_model": ((), _NO_ASSISTANT),
    "assistant_tokenizer": ((), _NO_ASSISTANT),
    "constraints": (([],), "beams are not constrained; prefix_allowed_tokens_fn is followed"),
    "continuous_batching_config": ((), "requests are not batched as they come; give a batch of prompts"),
    "custom_generate": ((), "code of a checkpoint is never run"),
    "diversity_penalty": ((0.0,), "there are no groups of beams"),
    "dola_layers": ((), "layers are not contrasted"),
    "force_words_ids": (([],), "beams are not constrained; prefix_allowed_tokens_fn is followed"),
    "forced_decoder_ids": (([],), "there is no encoder and decoder"),
    "guidance_scale": ((1.0,), "there is no classifier-free guidance"),
    "is_assistant": ((False,), _NO_ASSISTANT),
    "low_memory": ((False,), "beams are searched at once"),
    "num_assistant_tokens": ((5, 20), _NO_ASSISTANT),
    "negative_prompt_attention_mask": ((), "there is no classifier-free guidance"),
    "negative_prompt_ids": ((), "there is no classifier-free guidance"),
    "num_beam_groups": ((1,), "there are no groups of beams"),
    "penalty_alpha": ((0.0,), "there is no contrastive search"),
    "prompt_lookup_num_tokens": ((), _NO_ASSISTANT),
    "speculation_type": ((), _NO_ASSISTANT),
    "synced_gpus": ((False,), "every rank generates on its own"),
    "token_healing": ((False,), "prompts are taken as they are"),
    "top_h": ((), "min_p and typical_p are followed"),
    "use_mtp": ((False,), _NO_ASSISTANT),
    "watermarking_config": ((), "there is no watermark"),
}
# Settings that change no token by themselves: they steer assistants, encoders, compilation or memory, none of which is
# here to be steered.
WITHOUT_EFFECT = frozenset(
    {
        "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "cache_config",
        "compile_config", "decoder_start_token_id", "disable_compile", "generation_kwargs",
        "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens_schedule", "prefill_chunk_size",
        "target_lookbehind",
    }
)  # fmt: skip
_LENGTH_OF_OLD_FILES = 20  # what releases wrote for max_length where nobody had said anything


class GenerationConfig:
    """Settings by name, as attributes; what a file holds beside those that ``generate`` follows is kept.

    Args:
        settings: those given; others read as their defaults.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = {name: value for name, value in settings.items() if name != "transformers_version"}

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("settings", {})
        if name in settings:
            return settings[name]
        if name in DEFAULTS:
            return DEFAULTS[name]
        if name in NEUTRAL:
            return None
        raise AttributeError(f"GenerationConfig has no setting {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "settings":
            super().__setattr__(name, value)
        else:
            self.settings[name] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.settings == other.settings

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in sorted(self.settings.items()))})"

    @classmethod
    def wrap(cls, value: Any) -> GenerationConfig:
        """This class, a mapping, an object with ``to_dict`` (Transformers'), or None.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, GenerationConfig):
            return value
        if value is None:
            return cls()
        if not isinstance(value, Mapping):
            read = getattr(value, "to_diff_dict", None) or getattr(value, "to_dict", None)
            if read is None:
                raise ValueError(
                    f"generation_config is a {type(value).__name__}; give a GenerationConfig or a "
                    "dictionary of settings."
                )
            value = read()
        return cls(**value)

    @classmethod
    def from_model_config(cls, config: Any) -> Self:
        """What the ``config.json`` of earlier releases says of generation, token ids aside."""
        kept: dict[str, Any] = config.kept()
        names = DEFAULTS.keys() | NEUTRAL.keys()
        return cls(**_without_old_length({name: value for name, value in kept.items() if name in names}))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a ``generation_config.json``.

        Raises:
            ValueError: it cannot be read, or is no JSON object.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as JSON ({error}); restore it.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object of settings.")
        return cls(**_without_old_length(values))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub: Any) -> Self:
        """Read that of a checkpoint folder or a hub id.

        Raises:
            ValueError: there is no such checkpoint, or it has none.
        """
        from ...checkpoint import CheckpointFolder, HubOptions

        return cls.from_file(CheckpointFolder(path, HubOptions(**hub)).require(FILE))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def to_json(self) -> str:
        return json.dumps(self.settings, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``generation_config.json``; the folder is made if missing."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / FILE, self.to_json())

    def over(self, below: GenerationConfig) -> GenerationConfig:
        """These settings, and those of ``below`` where there are none; a length asked for here is not undone there."""
        under = dict(below.settings)
        lengths = ("max_new_tokens", "max_length")
        if any(self.settings.get(name) is not None for name in lengths):
            under = {name: value for name, value in under.items() if name not in lengths}
        return GenerationConfig(**{**under, **self.settings})

    def resolved(self) -> dict[str, Any]:
        """Every setting of `DEFAULTS` with its value; null asks for the default.

        Raises:
            ValueError: a setting that is not followed asks for something (named).
        """
        asked = [
            f"{name}={self.settings[name]!r} ({reason})"
            for name, (neutral, reason) in NEUTRAL.items()
            if self.settings.get(name) is not None and self.settings[name] not in neutral
        ]
        if asked:
            raise ValueError(
                f"The generation settings hold {', '.join(asked)}, which generate does not follow; take it out of the "
                f"call, of {FILE} or of model.generation_config, or set it to None."
            )
        return {
            name: default if self.settings.get(name) is None else self.settings[name]
            for name, default in DEFAULTS.items()
        }


def _without_old_length(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if (k, v) != ("max_length", _LENGTH_OF_OLD_FILES)}
