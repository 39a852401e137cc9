"""The text side of a processor: a ``tokenizers`` tokenizer under the names of Transformers' tokenizers."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Tokenizer

from .checkpoint import CheckpointFolder, HubOptions
from .files import write_atomically
from .inputs import BatchFeature, as_kind, check_return_tensors
from .received import read_bytes, read_settings
from .received_tokenizer import encode_batch, guarded, is_plain

# What ``clean_up_tokenization_spaces`` joins again: English punctuation and contractions.
_TIDIED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")
_PADDING = (True, False, "longest", "max_length", "do_not_pad")
_TRUNCATION = (True, False, "longest_first", "only_first", "do_not_truncate")
# What a processor's call does that does not say, and all settings of ``tokenizer_config.json`` that may be given beside
# a checkpoint.
_OF_CALLS = frozenset({"max_length", "padding", "truncation"})
SETTINGS = _OF_CALLS | {
    "additional_special_tokens", "bos_token", "chat_template", "eos_token", "model_max_length", "pad_token",
    "padding_side", "truncation_side", "unk_token",
}  # fmt: skip
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


class PretrainedTokenizer(ABC):
    """Text to ids and back, by the names and meanings of Transformers' tokenizers.

    Args:
        backend: the tokenizer itself.
        tokens: ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``; LLaMA's by default. An empty ``bos_token``
            says that none begins a text.
        padding_side: ``"left"`` (for generation) or ``"right"``.
        truncation_side: which end of a text that is too long goes, ``"right"`` or ``"left"``.
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
        truncation_side: str = "right",
        model_max_length: int | None = None,
        additional_special_tokens: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r} is not known; use 'left' or 'right'.")
        if truncation_side not in ("left", "right"):
            raise ValueError(f"truncation_side={truncation_side!r} is not known; use 'left' or 'right'.")
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self._plain = is_plain(backend)
        names = {**ROLES, **{k: v for k, v in (tokens or {}).items() if v is not None}}
        self.bos_token, self.eos_token = names["bos_token"] or None, names["eos_token"]
        self.pad_token, self.unk_token = names["pad_token"], names["unk_token"]
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.model_max_length = model_max_length
        self.additional_special_tokens = list(additional_special_tokens)
        self.settings = dict(settings or {})
        self.bos_token_id = None if self.bos_token is None else self.require(self.bos_token)
        self.eos_token_id = self.require(self.eos_token)
        self.pad_token_id = self.require(self.pad_token)
        self.unk_token_id = backend.token_to_id(self.unk_token)

    @property
    def chat_template(self) -> Any:
        """Jinja template of dialogues, or None; kept for programs that apply it."""
        return self.settings.get("chat_template")

    @property
    def of_calls(self) -> dict[str, Any]:
        """How a processor pads and cuts where its call does not say."""
        return {k: v for k, v in self.settings.items() if k in _OF_CALLS and v is not None}

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        """Tokens of the base vocabulary, added ones not counted."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        named: dict[str, Any] = {name: getattr(self, name) for name in ROLES}
        if self.additional_special_tokens:
            named["additional_special_tokens"] = list(self.additional_special_tokens)
        return named

    @property
    def all_special_tokens(self) -> list[str]:
        named = [getattr(self, name) for name in ROLES if getattr(self, name) is not None]
        return list(dict.fromkeys([*named, *self.additional_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.require(token) for token in self.all_special_tokens]

    def add_tokens(self, tokens: str | Sequence[str], special_tokens: bool = False) -> int:
        """Add tokens that the vocabulary lacks, and return how many; the model needs rows for them
        (``resize_token_embeddings``).
        """
        tokens = [tokens] if isinstance(tokens, str) else list(tokens)
        new = [AddedToken(str(t), normalized=False, special=special_tokens) for t in tokens]
        if special_tokens:
            known = self.additional_special_tokens
            known.extend(str(token) for token in tokens if str(token) not in known)
            return self.backend.add_special_tokens(new)
        return self.backend.add_tokens(new)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any]) -> int:
        """Add special tokens by their roles: ``additional_special_tokens``, ``pad_token`` and so on."""
        added = 0
        for name, value in special_tokens_dict.items():
            if name in ("additional_special_tokens", "extra_special_tokens"):
                added += self.add_tokens(value, special_tokens=True)
            elif name in ROLES:
                added += self.backend.add_special_tokens(
                    [AddedToken(str(value), normalized=False, special=True)]
                )
                setattr(self, name, str(value))
                setattr(self, f"{name}_id", self.require(str(value)))
            else:
                raise ValueError(
                    f"add_special_tokens knows {', '.join(ROLES)} and additional_special_tokens, not {name}."
                )
        return added

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token, or of each of several; of one that is unknown, the unknown token's."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or of each of several."""
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(values, int):
            return self.backend.id_to_token(values)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend.id_to_token(int(i)) for i in values if int(i) not in skipped]

    def find(self, token: str) -> int | None:
        """Id of a token, or None if the vocabulary lacks it."""
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

    def rows(
        self, texts: Sequence[str], *, add_special_tokens: bool = False, max_length: int | None = None
    ) -> list[list[int]]:
        """Ids of each text, of at most ``max_length`` tokens."""
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"A text is a {type(wrong).__name__}; give strings.")
        rows = encode_batch(self.backend, texts, plain=self._plain, add_special_tokens=add_special_tokens)
        if max_length is None:
            return rows
        if self.truncation_side == "left":
            return [row[max(len(row) - max_length, 0) :] for row in rows]
        return [row[:max_length] for row in rows]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
        return_token_type_ids: bool = False,
    ) -> BatchFeature:
        """``input_ids`` and ``attention_mask`` of a text or of several, int64 [B, T] or lists.

        Args:
            padding: True or ``"longest"``, ``"max_length"``, or False.
            truncation: cut to ``max_length`` tokens.
            return_tensors: ``"pt"``, ``"np"``, or None for lists.

        Raises:
            ValueError: something is no text, an option is not known, or texts of unlike length are to be one tensor.
        """
        check_return_tensors(return_tensors)
        if truncation not in _TRUNCATION:
            raise ValueError(f"truncation={truncation!r} is not known; use True or False.")
        cut = truncation not in (False, "do_not_truncate")
        single = isinstance(text, str)
        limit = max_length or self.model_max_length
        rows = self.rows(
            [text] if isinstance(text, str) else text,
            add_special_tokens=add_special_tokens,
            max_length=limit if cut else None,
        )
        ids, masks = self.pad_rows(
            rows, self.padded_length(rows, padding, limit, pad_to_multiple_of), padding_side
        )
        values = {"input_ids": ids, "attention_mask": masks}
        if not return_attention_mask:
            del values["attention_mask"]
        if return_token_type_ids:
            values["token_type_ids"] = [[0] * len(row) for row in ids]
        if return_tensors is None:
            return BatchFeature({name: rows[0] if single else rows for name, rows in values.items()})
        return BatchFeature({name: as_kind(rows, return_tensors, "Texts") for name, rows in values.items()})

    def encode(self, text: Any, *, add_special_tokens: bool | None = None, **options: Any) -> Any:
        """Ids of one text; of several, a list of ids each (without special tokens unless they are asked for)."""
        if isinstance(text, str):
            special = True if add_special_tokens is None else add_special_tokens
            return self(text, add_special_tokens=special, **options)["input_ids"]
        return self.rows(text, add_special_tokens=bool(add_special_tokens), **options)

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """The text's tokens as strings."""
        return guarded(
            lambda: self.backend.encode(text, add_special_tokens=add_special_tokens).tokens, plain=self._plain
        )

    @staticmethod
    def padded_length(
        rows: Sequence[Sequence[int]], padding: bool | str, limit: int | None, multiple: int | None = None
    ) -> int:
        """Tokens that rows are brought to, 0 for none."""
        if padding not in _PADDING:
            raise ValueError(f"padding={padding!r} is not known; use True, 'longest', 'max_length' or False.")
        if padding in (False, "do_not_pad"):
            return 0
        length = max((len(row) for row in rows), default=0)
        if padding == "max_length":
            if limit is None:
                raise ValueError("padding='max_length' needs max_length, which this tokenizer does not know.")
            length = max(limit, length)
        return length if not multiple else -(-length // multiple) * multiple

    def pad_rows(
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

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Bring tokenized texts to one length, as collators ask for it: a list of dictionaries, or one of lists."""
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [item[name] for item in encoded_inputs] for name in encoded_inputs[0]}
        rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in encoded_inputs["input_ids"]]
        length = self.padded_length(rows, padding, max_length or self.model_max_length, pad_to_multiple_of)
        ids, masks = self.pad_rows(rows, length, padding_side)
        rest = {k: v for k, v in encoded_inputs.items() if k not in ("input_ids", "attention_mask")}
        batch = BatchFeature({"input_ids": ids, "attention_mask": masks, **rest})
        return batch.convert_to_tensors(return_tensors)

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> Any:
        """Text of ids; of rows of ids, a list of texts.

        Args:
            ids: a tensor, an array, a list, or one id.
            skip_special_tokens: leave out the tokens that have a role.
            clean_up_tokenization_spaces: take the spaces before English punctuation away. What a checkpoint's files
                say of it is not followed: of tokens that hold their spaces, such as these, it damages the text.
        """
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(values, int):
            values = [values]
        values = [
            value if isinstance(value, int) else getattr(value, "tolist", lambda v=value: v)()
            for value in values
        ]
        if values and isinstance(values[0], list | tuple):
            return self.batch_decode(values, skip_special_tokens, clean_up_tokenization_spaces)
        text = guarded(
            lambda: self.backend.decode([int(i) for i in values], skip_special_tokens=skip_special_tokens),
            plain=self._plain,
        )
        if clean_up_tokenization_spaces:
            text = text.replace(" ' ", "'")
            for spaced in _TIDIED:
                text = text.replace(spaced, spaced[1:])
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> list[str]:
        """Text of each row of ids."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    @classmethod
    @abstractmethod
    def from_files(
        cls, find: Callable[[str], Path | None], source: str, changes: Mapping[str, Any] | None = None
    ) -> Self:
        """Build from the files of a checkpoint.

        Args:
            find: path of a file by name, or None if the checkpoint lacks it.
            source: name of the checkpoint for messages.
            changes: settings, of `SETTINGS`, that replace the files'.

        Raises:
            ValueError: the files are missing or damaged.
        """

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Read the tokenizer of a checkpoint folder or a hub id.

        Args:
            options: the fields of `HubOptions`; any other is one of `SETTINGS` and replaces the file's.

        Raises:
            ValueError: there is no such checkpoint, files are missing or damaged, or an option is not known.
        """
        names = {item.name for item in fields(HubOptions)}
        changes = {name: value for name, value in options.items() if name not in names}
        if unknown := sorted(changes.keys() - SETTINGS):
            raise ValueError(
                f"{cls.__name__}.from_pretrained was given {', '.join(unknown)}; its settings are "
                f"{', '.join(sorted(SETTINGS))}."
            )
        hub = HubOptions(**{name: value for name, value in options.items() if name in names})
        folder = CheckpointFolder(path, hub)
        return cls.from_files(folder.find, folder.name, changes)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "tokenizer.json", self.backend.to_str(pretty=True))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.settings,
            **{name: getattr(self, name) for name in ROLES},
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "additional_special_tokens": self.additional_special_tokens,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        write_atomically(root / "tokenizer_config.json", text)


def chat_template(find: Callable[[str], Path | None]) -> dict[str, Any]:
    """The template of dialogues where a file of its own holds it, as newer releases write it, by its name."""
    if path := find("chat_template.jinja"):
        return {"chat_template": read_bytes(path).decode("utf-8-sig", "replace")}
    if path := find("chat_template.json"):
        values = read_settings(path)
        return {"chat_template": values["chat_template"]} if "chat_template" in values else {}
    return {}


def without_begin(settings: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": ""}`` where settings say themselves that no token begins a text."""
    return {"bos_token": ""} if settings.get("bos_token", "") is None else {}


def content_of(token: Any) -> str | None:
    """A special token is written as a string or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
