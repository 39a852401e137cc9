"""Paths and texts as people type them, quoted for Hydra's grammar, which knows ASCII words without signs alone.

``data=été``, ``checkpoint=runs/a (copy)`` or ``task.question=What is it?`` would be refused as no ``key=value``. The
words of such a value that the grammar refuses are put into quotes; what it can read is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Settings that hold one path or name.
PATHS = (
    "checkpoint",
    "ckpt_path",
    "data_path",
    "data.tokenizer",
    "model.init_checkpoint",
    "model.init_text",
    "model.init_vision",
    "model.tokenizer",
    "name",
    "runs_dir",
)
# What separates words inside a value: brackets, commas, the colon of a mapping (an address has one too).
_SEPARATORS = re.compile(r"([\[\]{},]|:\s)")


def quote_words(arguments: Iterable[str]) -> list[str]:
    """The arguments for Hydra: those that its grammar refuses with their words quoted, where that is what it takes."""
    return [_quoted(argument) for argument in arguments]


def quote_paths(arguments: Iterable[str]) -> list[str]:
    """The arguments with whole paths and names in quotes, so that they arrive as typed, ``007`` and ``a,b`` too.

    Quotes of the user's own, ``null``, interpolations and the alternatives of a sweep stay what they are.
    """
    given = list(arguments)
    if {"-m", "--multirun"} & set(given):
        return given
    return [_quoted_path(argument) for argument in given]


def _quoted_path(argument: str) -> str:
    key, _, value = argument.partition("=")
    if key not in PATHS or not value or value == "null" or value[0] in "'\"" or "${" in value:
        return argument
    if _reads(argument) and OverridesParser.create().parse_override(argument).value() == value:
        return argument
    return f"{key}={_quote(value)}"


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or _reads(argument):
        return argument
    words = [word if _is_plain(word) else _quote_word(word) for word in _SEPARATORS.split(value)]
    candidates = [f"{key}={''.join(words)}"]
    if value[:1] not in set("[{'\""):  # a list or quotes that are not closed are a slip, not a name
        candidates.append(f"{key}={_quote(value)}")
    return next((candidate for candidate in candidates if _reads(candidate)), argument)


def _is_plain(word: str) -> bool:
    return not word.strip() or bool(_SEPARATORS.fullmatch(word)) or _reads(f"x={word.strip()}")


def _quote_word(word: str) -> str:
    start = len(word) - len(word.lstrip())
    end = len(word.rstrip())
    return word[:start] + _quote(word[start:end]) + word[end:]


def _quote(text: str) -> str:
    # In Hydra's quotes only a quote, and backslashes before one, are escaped.
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    escaped = re.sub(r"(\\+)$", lambda found: found[1] * 2, escaped)
    return f"'{escaped}'"


def _reads(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
