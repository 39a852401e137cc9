"""Captions to token ids, from ``tokenizer.json`` or from CLIP's ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..received import read_settings
from ..received_tokenizer import read_tokenizer
from ..tokenizer import PretrainedTokenizer, chat_template, content_of

_CLIP_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_DEFAULT_LENGTH = 77
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


class GroupViTTokenizer(PretrainedTokenizer):
    """Tokenizer of captions: begin token, pieces, end token. It is called as `PretrainedTokenizer` is.

    Args:
        backend: tokenizer whose post-processor adds the begin and end tokens.
        eos_token, bos_token, pad_token: special tokens; padding defaults to the end token, which also stands for
            what is unknown, as in CLIP.
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
        names: dict[str, str | None] = {
            "bos_token": bos_token or eos_token,
            "eos_token": eos_token,
            "unk_token": eos_token,
            "pad_token": pad_token or eos_token,
        }
        settings = dict(settings or {})
        super().__init__(
            backend,
            names,
            padding_side=settings.get("padding_side", "right"),
            truncation_side=settings.get("truncation_side", "right"),
            model_max_length=model_max_length,
            additional_special_tokens=[
                text
                for token in settings.get("additional_special_tokens") or []
                if (text := content_of(token))
            ],
            settings=settings,
        )

    def rows(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, max_length: int | None = None
    ) -> list[list[int]]:
        """Ids of each caption, of at most ``max_length`` tokens; begin and end tokens are kept."""
        wrong = next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"text holds a {type(wrong).__name__}; give a string or a list of strings.")
        rows = super().rows(texts, add_special_tokens=add_special_tokens)
        if max_length is None:
            return rows
        around = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        before = 1 if around > 1 else 0
        after = around - before
        if max_length < around:
            raise ValueError(
                f"max_length={max_length} leaves no room for the {around} tokens that begin and end a caption; give "
                "more."
            )

        def cut(row: list[int]) -> list[int]:
            if len(row) <= max_length:
                return row
            inner, room = row[before : len(row) - after], max_length - around
            kept = inner[len(inner) - room :] if self.truncation_side == "left" else inner[:room]
            return [*row[:before], *kept, *row[len(row) - after :]]

        return [cut(row) for row in rows]

    def encode(self, text: Any, *, add_special_tokens: bool | None = None, **options: Any) -> Any:
        """Ids of one caption; of several, a list of ids each."""
        special = True if add_special_tokens is None else add_special_tokens
        return self(text, add_special_tokens=special, **options)["input_ids"]

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> Any:
        """Text of ids; of rows of ids, a list of texts. Arguments are those of `PretrainedTokenizer`."""
        text = super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **options)
        return text.replace("</w>", " ").strip() if isinstance(text, str) else text

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
            ValueError: the files are missing or damaged.
        """
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if path := find(name):
                settings.update(read_settings(path))
        settings |= chat_template(find) | dict(changes or {})
        tokens = {key: content_of(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
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
