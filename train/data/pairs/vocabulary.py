"""Which words a caption tokenizer does not know, and a tokenizer made of a data set's own captions.

A word tokenizer turns what it has never seen into one token, so captions of other things all read alike: training
goes on and learns nothing. Byte-level tokenizers, as CLIP's is, know every word.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ....models.received_tokenizer import encodings, is_plain
from ..report import BadSample

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTTokenizer
    from ..shards.reader import ShardSet

# Of the captions' tokens: from here on it is said, and from there on training is refused.
WARN_SHARE, REFUSE_SHARE = 0.01, 0.25
CHECKED_CAPTIONS = 128
_BOS, _EOS, _END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


@dataclass(frozen=True)
class Unknown:
    """What a tokenizer does not know of some texts: tokens, of how many, and the words they stand for."""

    tokens: int
    of: int
    words: tuple[str, ...]

    @property
    def share(self) -> float:
        return self.tokens / max(self.of, 1)


def has_unknown_token(tokenizer: GroupViTTokenizer) -> bool:
    """Whether words can be unknown at all: byte-level vocabularies hold every one, and name the end token for it."""
    return getattr(tokenizer.backend.model, "unk_token", None) not in (None, tokenizer.eos_token)


def unknown_words(tokenizer: GroupViTTokenizer, texts: Sequence[str]) -> Unknown:
    """Count the tokens of ``texts`` that stand for what the tokenizer does not know, the commonest words first."""
    backend = tokenizer.backend
    token = getattr(backend.model, "unk_token", None)
    number = None if token is None else backend.token_to_id(token)
    if not has_unknown_token(tokenizer):
        number = None
    unknown, total = 0, 0
    words: Counter[str] = Counter()
    for text, encoding in zip(texts, encodings(backend, texts, plain=is_plain(backend)), strict=True):
        for i, (start, stop), special in zip(
            encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            if special and stop == start:
                continue
            total += 1
            if i == number and stop > start:
                unknown += 1
                words[text[start:stop].lower()] += 1
    return Unknown(unknown, total, tuple(word for word, _ in words.most_common()))


def check_captions(tokenizer: GroupViTTokenizer, captions: Sequence[str], source: str) -> str | None:
    """A warning where the tokenizer does not know some of the captions' words, or None.

    Raises:
        ValueError: it does not know so many that nothing could be learnt.
    """
    found = unknown_words(tokenizer, captions)
    if found.share < WARN_SHARE:
        return None
    words = ", ".join(repr(word) for word in found.words[:5])
    text = (
        f"the tokenizer {source} does not know {found.share:.0%} of the words of the captions ({words}"
        f"{' …' if len(found.words) > 5 else ''}); `interloom data tokenizer SHARDS OUT` makes one of them, for "
        "model.tokenizer=OUT"
    )
    if found.share >= REFUSE_SHARE:
        raise ValueError(f"{text}.")
    return f"WARNING: {text}."


def unknown_names(tokenizer: GroupViTTokenizer, names: Sequence[str]) -> list[str]:
    """Those of the names of which the tokenizer knows no word."""
    wholly = []
    for name in names:
        found = unknown_words(tokenizer, [name])
        if found.of and found.tokens == found.of:
            wholly.append(name)
    return wholly


def captions_of(shards: ShardSet, limit: int | None = None) -> Iterator[str]:
    """All captions of ``limit`` pairs, evenly spread; samples without one are left out."""
    from ..shards.reader import ShardReader
    from .captions import read_captions

    count = len(shards) if limit is None else min(limit, len(shards))
    reader = ShardReader(shards)
    chosen = np.linspace(0, len(shards) - 1, count).astype(np.int64).tolist() if count else []
    for start in range(0, count, 256):
        for record in reader.read_many(chosen[start : start + 256]):
            if isinstance(record, BadSample):
                continue
            with suppress(BadSample):
                yield from read_captions(record)


def build_tokenizer(
    captions: Iterable[str], *, vocab_size: int = 8192, model_max_length: int = 77
) -> GroupViTTokenizer:
    """A byte-level BPE tokenizer of CLIP's form, its merges learnt from ``captions``.

    It knows every text; the end token has the highest id, as in CLIP's.

    Raises:
        ValueError: there are no captions, or no room for a vocabulary.
    """
    from ....models.groupvit.tokenizer import GroupViTTokenizer, clip_backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*alphabet, *(f"{byte}{_END_OF_WORD}" for byte in alphabet)]
    if vocab_size < len(fixed) + 2:
        raise ValueError(f"vocab_size={vocab_size} is too small; {len(fixed) + 2} hold single bytes alone.")
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for caption in captions:
            seen += 1
            yield caption

    # The merges alone are taken from this one; which of its tokens exist by themselves is decided below.
    learner = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD, continuing_subword_prefix=""))
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        _write(vocab, merges, [*fixed, _BOS, _EOS], [])
        like = clip_backend(vocab, merges)
        learner.normalizer = like.normalizer if like.normalizer is not None else normalizers.NFC()  # type: ignore[assignment]
        learner.pre_tokenizer = like.pre_tokenizer  # type: ignore[assignment]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=2,
            initial_alphabet=alphabet,
            end_of_word_suffix=_END_OF_WORD,
            show_progress=False,
        )
        learner.train_from_iterator(counted(), trainer)
        if not seen:
            raise ValueError("the shards hold no captions, so no tokenizer can be made of them.")
        pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        tokens = list(dict.fromkeys([*fixed, *("".join(pair) for pair in pairs)]))[: vocab_size - 2]
        kept = set(tokens)
        pairs = [pair for pair in pairs if "".join(pair) in kept]
        _write(vocab, merges, [*tokens, _BOS, _EOS], pairs)
        return GroupViTTokenizer(clip_backend(vocab, merges), model_max_length=model_max_length)


def _write(vocab: Path, merges: Path, tokens: list[str], pairs: list[tuple[str, ...]]) -> None:
    vocab.write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    merges.write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in pairs), encoding="utf-8")
