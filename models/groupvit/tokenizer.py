"""Captions to token ids, from ``tokenizer.json`` or from CLIP's ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..received import read_settings
from ..received_tokenizer import encode_batch, guarded, is_plain, read_tokenizer

_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULT_LENGTH = 77
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


class GroupViTTokenizer:
    """Tokenizer of captions: begin token, pieces, end token.

    Args:
        backend: tokenizer whose post-processor adds the begin and end tokens.
        eos_token, bos_token, pad_token: special tokens; padding defaults to the end token.
        model_max_length: longest caption in tokens, special ones included.
        settings: further content of ``tokenizer_config.json``, kept when saving.

    Raises:
        ValueError: a special token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        eos_token: str = _EOS,
        bos_token: str | None = _BOS,
        pad_token: str | None = None,
        model_max_length: int = _DEFAULT_LENGTH,
        settings: dict[str, Any] | None = None,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._plain = is_plain(backend)
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.pad_token = pad_token or eos_token
        self.model_max_length = model_max_length
        self.settings = dict(settings or {})
        self.eos_token_id = self._id(self.eos_token)
        self.pad_token_id = self._id(self.pad_token)
        self.bos_token_id = None if bos_token is None else self._id(bos_token)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def __len__(self) -> int:
        return self.vocab_size

    def encode(
        self, texts: Sequence[str], *, truncation: bool = False, max_length: int | None = None
    ) -> list[list[int]]:
        """Token ids of each caption; with ``truncation`` at most ``max_length``, the end token kept."""
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"text holds a {type(wrong).__name__}; give a string or a list of strings.")
        limit = max_length or self.model_max_length
        rows = encode_batch(self.backend, texts, plain=self._plain)
        if not truncation:
            return rows
        return [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text = guarded(
            lambda: self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens),
            plain=self._plain,
        )
        return text.replace("</w>", " ").strip()

    @classmethod
    def from_files(cls, find: Callable[[str], Path | None], source: str) -> Self:
        """Build from the files of a checkpoint.

        Args:
            find: path of a file by name, or None if the checkpoint lacks it.
            source: name of the checkpoint for messages.

        Raises:
            ValueError: the files are missing or damaged.
        """
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if path := find(name):
                settings.update(read_settings(path))
        tokens = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        eos = tokens["eos_token"] or _EOS
        bos = tokens["bos_token"] or _BOS
        if path := find("tokenizer.json"):
            backend = read_tokenizer(path)
            settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        else:
            vocab, merges = find("vocab.json"), find("merges.txt")
            if vocab is None or merges is None:
                raise ValueError(
                    f"{source} has no tokenizer; expected tokenizer.json, or vocab.json with merges.txt."
                )
            backend = clip_backend(vocab, merges, bos, eos)
            settings["tokenizer_class"] = "CLIPTokenizer"
        length = settings.get("model_max_length") or _DEFAULT_LENGTH
        return cls(
            backend,
            eos_token=eos,
            bos_token=bos if backend.token_to_id(bos) is not None else None,
            pad_token=tokens["pad_token"],
            # Transformers writes 1e30 for "not known".
            model_max_length=int(length) if length < 1_000_000 else _DEFAULT_LENGTH,
            settings=settings,
        )

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Read from a local folder."""
        root = Path(folder)
        return cls.from_files(lambda name: root / name if (root / name).is_file() else None, str(folder))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(root / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.settings,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "model_max_length": self.model_max_length,
        }
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        (root / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"the special token {token!r} is not in the tokenizer's vocabulary; name the right ones in "
                "tokenizer_config.json."
            )
        return found


def clip_backend(vocab: Path, merges: Path, bos: str = _BOS, eos: str = _EOS) -> Tokenizer:
    """CLIP's lower-casing byte-level BPE from its two files."""
    try:
        model = BPE.from_file(
            str(vocab), str(merges), unk_token=eos, end_of_word_suffix="</w>", continuing_subword_prefix=""
        )
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{vocab} and {merges} are not a BPE vocabulary ({error}); restore them.") from error
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    bos_id, eos_id = backend.token_to_id(bos), backend.token_to_id(eos)
    if bos_id is None or eos_id is None:
        raise ValueError(
            f"{vocab} lacks the special tokens {bos} and {eos}; use the vocabulary of the model."
        )
    backend.add_special_tokens([bos, eos])
    backend.post_processor = processors.RobertaProcessing(
        (eos, eos_id), (bos, bos_id), trim_offsets=False, add_prefix_space=False
    )
    return backend


def _content(token: Any) -> str | None:
    """A special token is written as a string or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
