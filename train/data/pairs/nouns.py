"""Nouns of captions, taken once when shards are built.

Three ways: a column of the source, a list of words to look for, or NLTK's tagger. The last follows GroupViT's
recipe, whose "nouns" are the tags NN, NNS, NNP and every verb form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..text import mend_text, read_text_file
from .cells import listed, texts_of

NounFinder = Callable[[str], list[str]]
_TAGS = ("NN", "NNS", "NNP")


def unique(words: Iterable[str]) -> list[str]:
    """Words in order of first appearance, stripped, without empties."""
    return list(dict.fromkeys(stripped for word in words if (stripped := word.strip())))


def nouns_from_value(value: Any) -> list[str]:
    """Nouns from a cell of a table: a list of words, also one saved as text, or words with commas, semicolons or bars
    between."""
    if isinstance(value, str) and listed(value) is None:
        return unique(mend_text(part)[0] for part in re.split(r"[,;|]", value))
    if isinstance(value, str):
        value = listed(value)
    return unique(mend_text(text)[0] for text in texts_of(value))


class WordlistFinder:
    """Finds listed words and phrases in captions, whole words only, plural endings allowed.

    Args:
        words: in the spelling that shall be returned; longer phrases win over their parts.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = {" ".join(word.lower().split()): word for word in unique(words)}
        if not self.words:
            raise ValueError("the word list is empty, expected one word or phrase a line")
        longest_first = sorted(self.words, key=len, reverse=True)
        self._pattern = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")(?:es|s)?\b")

    @classmethod
    def from_file(cls, path: str | Path) -> WordlistFinder:
        """One word or phrase a line; lines that begin with # are comments."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no word list at {path}, expected a text file with one word a line")
        lines = read_text_file(path, "word list").splitlines()
        return cls(line for line in lines if not line.startswith("#"))

    def __call__(self, caption: str) -> list[str]:
        text = " ".join(caption.lower().split())
        return unique(self.words[match.group(1)] for match in self._pattern.finditer(text))


class NltkFinder:
    """Nouns and verbs by NLTK's tokeniser and tagger.

    Raises:
        ValueError: NLTK or its data are not there; says how to get them.
    """

    def __init__(self) -> None:
        try:
            import nltk
        except ImportError:
            raise ValueError("--nouns nltk needs NLTK: pip install 'interloom[nltk]'") from None
        self._tag, self._tokenize = nltk.pos_tag, nltk.word_tokenize
        try:
            self("a cat")
        except LookupError:
            raise ValueError(
                "--nouns nltk needs the tagger's data: run `python -m nltk.downloader punkt_tab "
                "averaged_perceptron_tagger_eng` once, or use --nouns wordlist"
            ) from None

    def __call__(self, caption: str) -> list[str]:
        tagged = self._tag(self._tokenize(caption))
        return unique(word for word, tag in tagged if tag in _TAGS or tag.startswith("VB"))


def noun_finder(kind: str | None, words: str | Path | None) -> NounFinder | None:
    """The finder for ``--nouns``: None, ``column`` (the source's own), ``wordlist`` or ``nltk``.

    Raises:
        ValueError: unknown kind, or a word list that is missing.
    """
    if kind in (None, "column"):
        return None
    if kind == "wordlist":
        if words is None:
            raise ValueError("--nouns wordlist needs --words FILE, a text file with one word a line")
        return WordlistFinder.from_file(words)
    if kind == "nltk":
        return NltkFinder()
    raise ValueError(f"--nouns {kind} given, expected column, wordlist or nltk")
