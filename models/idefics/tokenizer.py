"""IDEFICS's tokenizer: LLaMA's special tokens, padding on the left, and the fast tokenizers it can stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..received import read_settings
from ..received_tokenizer import read_tokenizer
from ..tokenizer import ROLES, PretrainedTokenizer, chat_template, content_of, without_begin


class IdeficsTokenizer(PretrainedTokenizer):
    """`PretrainedTokenizer` as the released checkpoints' files fill it."""

    @classmethod
    def wrap(cls, tokenizer: Any) -> PretrainedTokenizer:
        """Take a tokenizer of this package, a bare ``tokenizers.Tokenizer``, or a fast tokenizer of Transformers.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(tokenizer, PretrainedTokenizer):
            return tokenizer
        if isinstance(tokenizer, Tokenizer):
            return cls(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; give an IdeficsTokenizer, a "
                "tokenizers.Tokenizer or a fast tokenizer of Transformers."
            )
        length = getattr(tokenizer, "model_max_length", None)
        return cls(
            Tokenizer.from_str(backend.to_str()),
            {name: getattr(tokenizer, name, None) for name in ROLES},
            padding_side=tokenizer.padding_side,
            truncation_side=getattr(tokenizer, "truncation_side", "right"),
            model_max_length=length if length and length < 1_000_000 else None,
            additional_special_tokens=[str(t) for t in _extra(tokenizer)],
            settings=_further(tokenizer),
        )

    @classmethod
    def from_files(
        cls, find: Callable[[str], Path | None], source: str, changes: Mapping[str, Any] | None = None
    ) -> Self:
        """Build from the files of a checkpoint.

        Args:
            find: path of a file by name, or None if the checkpoint lacks it.
            source: name of the checkpoint for messages.
            changes: settings, of `SETTINGS`, that replace the files'.

        Raises:
            ValueError: ``tokenizer.json`` is missing or damaged.
        """
        path = find("tokenizer.json")
        if path is None:
            old = find("tokenizer.model") is not None
            raise ValueError(
                f"{source} has no tokenizer.json"
                + (", only the slow tokenizer.model" if old else "")
                + '; write one where Transformers and sentencepiece are installed: python -c "from transformers import '
                f"AutoTokenizer; AutoTokenizer.from_pretrained('{source}').save_pretrained('FOLDER')\", and put its "
                "files beside the model's."
            )
        backend = read_tokenizer(path)
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if file := find(name):
                settings.update(read_settings(file))
        settings |= chat_template(find) | dict(changes or {})
        length = settings.get("model_max_length")
        extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        return cls(
            backend,
            {name: content_of(settings.get(name)) for name in ROLES} | without_begin(settings),
            padding_side=settings.get("padding_side", "left"),
            truncation_side=settings.get("truncation_side", "right"),
            # Transformers writes 1e30 for "not known".
            model_max_length=int(length) if length and length < 1_000_000 else None,
            additional_special_tokens=[content_of(t) or "" for t in extra] if isinstance(extra, list) else [],
            settings=settings,
        )


def _further(tokenizer: Any) -> dict[str, Any]:
    """Its template of dialogues, and how it was told to pad and cut where a call does not say."""
    told = getattr(tokenizer, "init_kwargs", {}) or {}
    found = {
        name: told[name] for name in ("padding", "truncation", "max_length") if told.get(name) is not None
    }
    template = getattr(tokenizer, "chat_template", None)
    return {**found, "chat_template": template} if template else found


def _extra(tokenizer: Any) -> list[Any]:
    mapped = getattr(tokenizer, "special_tokens_map", {}) or {}
    return list(
        mapped.get("additional_special_tokens") or getattr(tokenizer, "extra_special_tokens", None) or []
    )
