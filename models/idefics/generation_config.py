"""The options of ``generate``: their defaults, a checkpoint's, a call's, and what becomes of them.

Legend: R rows, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from . import constraints
from .constraints import LogitsProcessor
from .sampling import SamplingOptions


@dataclass
class GenerationConfig:
    """Options by the names and meanings of Transformers; docstring of ``generate`` for what needs words.

    Those of a ``generation_config.json`` that ``generate`` does not use are kept and written back (`kept`); one that
    would change the text and is not supported is an error when ``generate`` meets it.
    """

    OTHERS: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "num_beam_groups": (1, "diverse beams are not searched"),
        "diversity_penalty": (0.0, "diverse beams are not searched"),
        "penalty_alpha": (0.0, "there is no contrastive search"),
        "dola_layers": (None, "layers are not contrasted"),
        "guidance_scale": (1.0, "there is no classifier-free guidance"),
        "constraints": (None, "beams are not constrained; prefix_allowed_tokens_fn is"),
        "force_words_ids": (None, "beams are not constrained; prefix_allowed_tokens_fn is"),
        "prompt_lookup_num_tokens": (
            None,
            "there is no assisted decoding; results would be the same, sooner",
        ),
        "assistant_model": (None, "there is no assisted decoding; results would be the same, sooner"),
        "watermarking_config": (None, "there is no watermark"),
        "top_h": (None, "use min_p or typical_p"),
        "synced_gpus": (False, "ranks generate on their own"),
        "low_memory": (False, "beams are searched at once"),
        "token_healing": (False, "prompts are taken as they are"),
    }

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    max_time: float | None = None
    stop_strings: str | Sequence[str] | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    sequence_bias: Any = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    use_cache: bool = True
    cache_implementation: str = "dynamic"
    pad_token_id: Any = None
    bos_token_id: Any = None
    eos_token_id: Any = None
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False

    @property
    def kept(self) -> dict[str, Any]:
        """Options that `generate` does not use, as they were given."""
        return self.__dict__.setdefault("_kept", {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Options by name; None means the default."""
        known = {f.name for f in fields(cls)}
        result = cls(**{name: value for name, value in values.items() if name in known and value is not None})
        result.kept.update({name: value for name, value in values.items() if name not in known})
        return result

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read ``generation_config.json`` of a folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder) / "generation_config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as JSON ({error}); restore it.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object of options.")
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, and what is kept."""
        default = type(self)()
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**self.kept, **{name: v for name, v in own.items() if v != getattr(default, name)}}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``generation_config.json``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "generation_config.json").write_text(text, encoding="utf-8")

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A copy in which the values that are not None replace others.

        Raises:
            ValueError: a name is not known, or an option that is not supported is not at its default.
        """
        known = {f.name for f in fields(self)}
        given = {name: value for name, value in values.items() if value is not None}
        unknown = sorted(given.keys() - known - self.OTHERS.keys())
        if unknown:
            raise ValueError(
                f"generate was given {', '.join(unknown)}, which it does not know; check the name."
            )
        kept = {**self.kept, **{name: value for name, value in given.items() if name not in known}}
        for name, (default, reason) in self.OTHERS.items():
            value = kept.get(name)
            if value is not None and value != default:
                raise ValueError(f"generate was given {name}, which is not supported: {reason}.")
        result = replace(self, **{name: value for name, value in given.items() if name in known})
        result.kept.update(kept)
        return result

    @classmethod
    def of(cls, options: Any) -> Self:
        """This class from itself, a dictionary, or an object of Transformers with ``to_dict``."""
        if isinstance(options, cls):
            return options
        values = options.to_dict() if hasattr(options, "to_dict") else options
        if not isinstance(values, Mapping):
            raise ValueError(
                f"generation_config is a {type(options).__name__}; give a GenerationConfig or a dictionary."
            )
        bookkeeping = {"transformers_version", "_from_model_config", "is_assistant", "compile_config"}
        return cls.from_dict({name: value for name, value in values.items() if name not in bookkeeping})

    def sampling(
        self,
        ends: Sequence[int],
        prompt: int,
        limit: int,
        prompt_ids: Tensor,
        padding: Tensor | None,
        further: Sequence[LogitsProcessor],
        allowed: Callable[[int, Tensor], Sequence[int]] | None,
    ) -> SamplingOptions:
        """How tokens are chosen.

        Args:
            ends: ids that end a sequence.
            prompt, limit: length at the start and at the end.
            prompt_ids: int64 [R, T].
            padding: int64 [R], tokens of padding at the start of each row.
        """
        for name, wrong, need in (
            ("repetition_penalty", self.repetition_penalty <= 0, "a number above 0; 1 does nothing"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size < 0, "0 or the size of an n-gram"),
            (
                "bad_words_ids",
                any(len(word) == 0 for word in self.bad_words_ids or ()),
                "sequences of at least one id",
            ),
        ):
            if wrong:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {need}.")
        steps: list[LogitsProcessor] = []
        if self.sequence_bias is not None:
            steps.append(constraints.sequence_bias(self.sequence_bias))
        if self.encoder_repetition_penalty != 1.0:  # above 1 favours what the prompt holds
            steps.append(constraints.repetition(1.0 / self.encoder_repetition_penalty, prompt_ids))
        if self.repetition_penalty != 1.0:
            steps.append(constraints.repetition(self.repetition_penalty, ignored=padding))
        if self.no_repeat_ngram_size:
            steps.append(constraints.no_repeated_ngrams(self.no_repeat_ngram_size))
        if self.encoder_no_repeat_ngram_size:
            steps.append(constraints.no_repeated_ngrams(self.encoder_no_repeat_ngram_size, prompt_ids))
        words = [word for word in self.bad_words_ids or () if list(word) not in [[end] for end in ends]]
        if words:
            steps.append(constraints.sequence_bias([(word, float("-inf")) for word in words]))
        least = max(prompt + self.min_new_tokens, self.min_length)
        if ends and least > prompt:
            steps.append(constraints.until(least, constraints.ban(ends)))
        if allowed is not None:
            steps.append(constraints.allowed_by(allowed, self.num_beams))
        if self.forced_bos_token_id is not None:
            steps.append(constraints.at(1, constraints.force(self.forced_bos_token_id)))
        if self.forced_eos_token_id is not None:
            steps.append(constraints.at(limit - 1, constraints.force(self.forced_eos_token_id)))
        if self.remove_invalid_values:
            steps.append(constraints.without_invalid)
        if self.exponential_decay_length_penalty is not None:
            after, factor = self.exponential_decay_length_penalty
            steps.append(constraints.growing_end(prompt + int(after), float(factor), ends))
        if self.suppress_tokens:
            steps.append(constraints.ban(self.suppress_tokens))
        if self.begin_suppress_tokens:
            first = prompt if prompt > 1 or self.forced_bos_token_id is None else prompt + 1
            steps.append(constraints.at(first, constraints.ban(self.begin_suppress_tokens)))
        steps.extend(further)
        return SamplingOptions(
            self.do_sample,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.typical_p,
            self.epsilon_cutoff,
            self.eta_cutoff,
            # Beams need one more than can end.
            max(2, len(ends) + 1) if self.num_beams > 1 else 1,
            steps,
            self.renormalize_logits,
        )
