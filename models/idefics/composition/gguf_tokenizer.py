"""The tokenizer in a GGUF file's keys, as a ``tokenizers`` tokenizer.

Two kinds are read: byte-level BPE (``gpt2``), whose way of cutting text into words a file only names, and LLaMA's
SentencePiece BPE (``llama``), whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..tokenizer import IdeficsTokenizer
from .vocabulary import tokenizer_of

_UNKNOWN, _CONTROL, _OF_USER = 2, 3, 4  # types of tokens
_KEY = "tokenizer.ggml."
# How a text is cut into words before its bytes are merged, by the names of llama.cpp.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "llama-bpe": "|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),
    "qwen2": "|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt2": "gpt-2"}
PRE_TOKENIZERS = ("gpt-2", "smollm", *_CUTS)


def read_tokenizer_of(said: Mapping[str, Any], settings: Mapping[str, Any], source: str) -> IdeficsTokenizer:
    """The tokenizer that a file's keys describe.

    Raises:
        ValueError: there is none, or it is of a kind that is not known.
    """
    tokens, kind = said.get(f"{_KEY}tokens"), said.get(f"{_KEY}model")
    if not tokens:
        raise ValueError(f"{source} holds no tokenizer ({_KEY}tokens); give the folder of Transformers.")
    if kind == "gpt2":
        backend = _byte_level(said, list(tokens), source)
    elif kind == "llama":
        backend = _sentence_piece(said, list(tokens), source)
    else:
        raise ValueError(
            f"{source} has a tokenizer of kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece BPE) are known."
        )
    _mark_added(backend, list(tokens), list(said.get(f"{_KEY}token_type") or ()))
    names = {
        f"{role}_token": _token(tokens, said.get(f"{_KEY}{key}_token_id"))
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    begins = bool(said.get(f"{_KEY}add_bos_token", kind == "llama"))
    if begins and names["bos_token"]:
        number = said[f"{_KEY}bos_token_id"]
        backend.post_processor = _with_begin(backend.post_processor, names["bos_token"], number)
    files = {"add_bos_token": begins, "bos_token": names["bos_token"]}
    if template := said.get("tokenizer.chat_template"):
        files["chat_template"] = template
    return tokenizer_of(backend, source, settings, names, files)


def _token(tokens: Any, number: Any) -> str | None:
    return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None


def _byte_level(said: Mapping[str, Any], tokens: list[str], source: str) -> Tokenizer:
    merges = [tuple(line.split(" ", 1)) for line in said.get(f"{_KEY}merges") or ()]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ValueError(
            f"{source} has a byte-level tokenizer without its merges ({_KEY}merges); fetch it again."
        )
    named = str(said.get(f"{_KEY}pre", "gpt-2"))
    cut = _ALIASES.get(named, named)
    if cut not in PRE_TOKENIZERS:
        raise ValueError(
            f"{source} cuts text into words by {named!r} ({_KEY}pre); known are {', '.join(PRE_TOKENIZERS)}. Give the "
            "folder of Transformers, whose tokenizer.json says how."
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))  # type: ignore[arg-type]
    if cut in _CUTS:
        words: Any = pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, by_bytes])  # pyright: ignore
    else:
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps = [digits, by_bytes] if cut == "smollm" else [by_bytes]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore
    return backend


def _sentence_piece(said: Mapping[str, Any], tokens: list[str], source: str) -> Tokenizer:
    scores = said.get(f"{_KEY}scores")
    if not scores or len(scores) != len(tokens):
        raise ValueError(
            f"{source} has a SentencePiece tokenizer without its scores ({_KEY}scores); fetch it again."
        )
    unknown = _token(tokens, said.get(f"{_KEY}unknown_token_id", 0))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            merges_of(vocabulary, [float(score) for score in scores]),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    if said.get(f"{_KEY}add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(spaces)  # pyright: ignore
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if said.get(f"{_KEY}add_space_prefix", True):
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)  # pyright: ignore
    return backend


def merges_of(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that give SentencePiece's result: of all ways to make a piece, the best-scored piece's first."""
    found = []
    for piece, number in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-scores[number], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _mark_added(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Make tokens that stand for themselves whatever surrounds them what they are."""
    special = [t for t, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _UNKNOWN)]
    plain = [t for t, kind in zip(tokens, kinds, strict=False) if kind == _OF_USER]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in plain])


def _with_begin(processor: Any, token: str, number: int) -> Any:
    begin = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, number)]
    )
    return begin if processor is None else processors.Sequence([processor, begin])
