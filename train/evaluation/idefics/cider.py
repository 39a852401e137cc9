"""CIDEr of captions without Java.

The score is that of ``pycocoevalcap`` (Vedantam et al., CVPR 2015; its CIDEr-D variant with sigma 6, times ten), which
reads white-space separated words. Where the original calls Stanford's PTB tokenizer in Java, the Penn Treebank
tokenizer of ``nltk`` stands here, with the original's list of punctuation left out and with the two rules that change
scores most brought into line: a sentence may end inside a caption, and hyphens and slashes hold words together.
docs/evaluation.md says what still differs, and by how much.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_LEFT_OUT = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"}
# Periods that end a sentence: not one after a single letter, as in "u.s.", or after an abbreviation.
_SENTENCE_END = re.compile(
    r"(?<!\.)(?<!\b\w)(?<!\b(?:mr|ms|dr|st|jr|sr|vs|no))(?<!\b(?:mrs|etc))\.+(?=[\"')\]]*(?:\s|$))"
)
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})


def require_packages() -> tuple[Any, Any]:
    """The scorer and the tokenizer.

    Raises:
        ValueError: one of the packages is not installed.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise ValueError(
            f"task=caption needs the package {error.name}; install interloom[caption]."
        ) from None
    return Cider(), NLTKWordTokenizer()


def words(text: str, tokenizer: Any) -> str:
    """A caption's words in lower case, with single spaces between them and without punctuation."""
    text = _SENTENCE_END.sub(" ", " ".join(text.lower().translate(_QUOTES).split()))
    # The tokenizer takes the last period of a text for its end: one of ours keeps it off "5 p.m.".
    tokens = tokenizer.tokenize(text + " .", convert_parentheses=True)
    return " ".join(token.lower() for token in tokens if token not in _LEFT_OUT)


def cider(written: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """CIDEr of captions against the references of each: over all, and of each.

    Words are weighted by how few of *these* pictures they occur for, so the score belongs to the set as a whole.

    Raises:
        ValueError: a package is missing.
    """
    scorer, tokenizer = require_packages()
    truth = {n: [words(text, tokenizer) for text in texts] for n, texts in enumerate(references)}
    said = {n: [words(text, tokenizer)] for n, text in enumerate(written)}
    mean, each = scorer.compute_score(truth, said)
    return float(mean), [float(value) for value in each]
