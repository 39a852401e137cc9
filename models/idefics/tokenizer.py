"""The text side of the processor: a ``tokenizers`` tokenizer with IDEFICS's special tokens and padding."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..received import read_settings
from ..received_tokenizer import encode_batch, guarded, is_plain, read_tokenizer

_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


class IdeficsTokenizer:
    """Text to ids and back.

    Args:
        backend: the tokenizer itself.
        tokens: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``; LLaMA's by default.
        padding_side: ``"left"`` (for generation) or ``"right"``.
        model_max_length: longest text in tokens, where it is known.
        additional_special_tokens: tokens that text may hold and decoding may skip.
        settings: further content of ``tokenizer_config.json``, kept when saving.

    Raises:
        ValueError: a special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Tokenizer,
        tokens: dict[str, str | None] | None = None,
        *,
        padding_side: str = "left",
        model_max_length: int | None = None,
        additional_special_tokens: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r} is not known; use 'left' or 'right'.")
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._plain = is_plain(backend)
        names = {**_TOKENS, **{k: v for k, v in (tokens or {}).items() if v is not None}}
        self.bos_token, self.eos_token = names["bos_token"], names["eos_token"]
        self.pad_token, self.unk_token = names["pad_token"], names["unk_token"]
        self.padding_side = padding_side
        self.model_max_length = model_max_length
        self.additional_special_tokens = list(additional_special_tokens)
        self.settings = dict(settings or {})
        self.bos_token_id = self.require(self.bos_token)
        self.eos_token_id = self.require(self.eos_token)
        self.pad_token_id = self.require(self.pad_token)

    @classmethod
    def wrap(cls, tokenizer: Any) -> IdeficsTokenizer:
        """Take this class, a bare ``tokenizers.Tokenizer``, or a fast tokenizer of Transformers.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(tokenizer, IdeficsTokenizer):
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
            {name: getattr(tokenizer, name, None) for name in _TOKENS},
            padding_side=tokenizer.padding_side,
            model_max_length=length if length and length < 1_000_000 else None,
            additional_special_tokens=[str(t) for t in _extra(tokenizer)],
        )

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def require(self, token: str) -> int:
        """Id of a token that must exist."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"The token {token!r} is not in the tokenizer's vocabulary; add it, or use the tokenizer "
                "that belongs to the checkpoint."
            )
        return found

    def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, max_length: int | None = None
    ) -> list[list[int]]:
        """Ids of each text, of at most ``max_length`` tokens."""
        rows = encode_batch(self.backend, texts, plain=self._plain, add_special_tokens=add_special_tokens)
        return [row[:max_length] for row in rows]

    def pad(
        self, rows: Sequence[Sequence[int]], length: int, side: str | None = None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Bring rows to ``length``: ids and attention masks."""
        side = side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r} is not known; use 'left' or 'right'.")
        ids, masks = [], []
        for row in rows:
            gap = max(length - len(row), 0)
            fill, ones, zeros = [self.pad_token_id] * gap, [1] * len(row), [0] * gap
            ids.append(fill + list(row) if side == "left" else list(row) + fill)
            masks.append(zeros + ones if side == "left" else ones + zeros)
        return ids, masks

    def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        return guarded(
            lambda: self.backend.decode([int(i) for i in values], skip_special_tokens=skip_special_tokens),
            plain=self._plain,
        )

    @classmethod
    def from_files(cls, find: Callable[[str], Path | None], source: str) -> Self:
        """Build from the files of a checkpoint.

        Args:
            find: path of a file by name, or None if the checkpoint lacks it.
            source: name of the checkpoint for messages.

        Raises:
            ValueError: ``tokenizer.json`` is missing or damaged.
        """
        path = find("tokenizer.json")
        if path is None:
            raise ValueError(
                f"{source} has no tokenizer.json; write one with the fast tokenizer of the model (a "
                "tokenizer.model alone is not read)."
            )
        backend = read_tokenizer(path)
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if file := find(name):
                settings.update(read_settings(file))
        length = settings.get("model_max_length")
        extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        return cls(
            backend,
            {name: _content(settings.get(name)) for name in _TOKENS},
            padding_side=settings.get("padding_side", "left"),
            # Transformers writes 1e30 for "not known".
            model_max_length=int(length) if length and length < 1_000_000 else None,
            additional_special_tokens=[_content(t) or "" for t in extra] if isinstance(extra, list) else [],
            settings=settings,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(root / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.settings,
            **{name: getattr(self, name) for name in _TOKENS},
            "padding_side": self.padding_side,
            "additional_special_tokens": self.additional_special_tokens,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (root / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _extra(tokenizer: Any) -> list[Any]:
    mapped = getattr(tokenizer, "special_tokens_map", {}) or {}
    return list(
        mapped.get("additional_special_tokens") or getattr(tokenizer, "extra_special_tokens", None) or []
    )


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
