"""``tokenizer.json`` from outside: what one may cost is bounded.

The format lets a tokenizer replace text by longer text, step after step, and split it by any regular expression. Both
can be made to take all memory or for ever with a caption of a line. Growth is bounded by what the file says. An
expression of the plain shape that tokenizers have runs as it is; any other runs against the clock.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from .received import blaming, read_bytes

T = TypeVar("T")

MAX_BYTES = 512 * 2**20  # of the file; the largest vocabularies take some 40 MB
MAX_GROWTH = 64  # times that all replacements together may lengthen a text
SECONDS = 10.0  # for a call of a tokenizer whose expressions are not plain

# Repeated without end: a group, or what refers back to one. A class or a character is neither.
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{\d+,\d*\})|\\(?:[1-9]|k)|\(\?[PR0-9&]")
_REPEAT = re.compile(r"[*+]|\{\d+,\}")
_ESCAPE_OR_CLASS = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]", re.DOTALL)
_MOST_REPEATS = 2  # in an alternative: as many as published tokenizers have


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file.

    Raises:
        ValueError: the file is damaged or too large, or its replacements make texts grow without bound.
    """
    text = read_bytes(path, MAX_BYTES)
    return parse_tokenizer(text, path)


def parse_tokenizer(content: bytes, source: object) -> Tokenizer:
    """The tokenizer that the bytes of a ``tokenizer.json`` describe; ``source`` names them in messages.

    Raises:
        ValueError: as :func:`read_tokenizer`.
    """
    with blaming(source):
        try:
            described = json.loads(content.decode("utf-8-sig"))
            if not isinstance(described, dict):
                raise ValueError(f"expected an object, found a {type(described).__name__}")
            growth = _growth(described)
            backend = Tokenizer.from_str(content.decode("utf-8-sig"))
        except RecursionError:
            raise ValueError(f"{source} is nested too deeply to be a tokenizer; restore it.") from None
        except Exception as error:  # the library raises bare exceptions
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ValueError(f"{source} is not a tokenizer ({reason}); restore it.") from error
    if growth > MAX_GROWTH:
        raise ValueError(
            f"{source} replaces text by text {growth:,.0f} times as long, expected at most {MAX_GROWTH} times; use the "
            "tokenizer of another source."
        )
    return backend


def guarded(call: Callable[[], T], *, plain: bool) -> T:
    """Run a call of a tokenizer, against the clock where its expressions are not ``plain`` (:func:`is_plain`).

    Raises:
        ValueError: it takes longer than ``SECONDS``.
    """
    if plain:
        return call()
    result: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:
            errors.append(error)

    # Python cannot stop what runs in the library; it lets go of the lock there, and a daemon ends with the process.
    worker = threading.Thread(target=work, daemon=True)
    with _without_panics():
        worker.start()
        worker.join(SECONDS)
    gave_up = bool(errors) and type(errors[0]).__name__ == "PanicException"
    if errors and not gave_up:
        raise errors[0]
    if not result:
        raise ValueError(
            f"the tokenizer took longer than {SECONDS:.0f} s for a text, or gave up: a regular expression in its "
            "tokenizer.json does not end in reasonable time; use the tokenizer of another source."
        )
    return result[0]


@contextmanager
def _without_panics() -> Iterator[None]:
    """Keep the library from writing pages about an expression that it gave up to the terminal itself."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def encodings(
    backend: Tokenizer, texts: Sequence[str], *, plain: bool, add_special_tokens: bool = True
) -> list[Any]:
    """The library's encoding of each text.

    Raises:
        ValueError: the tokenizer does not come to an end with them.
    """
    with blaming("the tokenizer", "use the tokenizer of the model"):
        return guarded(
            lambda: backend.encode_batch(list(texts), add_special_tokens=add_special_tokens), plain=plain
        )


def encode_batch(
    backend: Tokenizer, texts: Sequence[str], *, plain: bool, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each text.

    Raises:
        ValueError: as :func:`encodings`.
    """
    found = encodings(backend, texts, plain=plain, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in found]


def is_plain(backend: Tokenizer) -> bool:
    """Whether every regular expression of a tokenizer is plain (:func:`is_plain_expression`)."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    return all(is_plain_expression(e) for part in parts for e in _expressions(_state(part)))


def _state(part: Any) -> Any:
    """What a component of a tokenizer is made of; those written in Python have no state and no expression."""
    if part is None:
        return None
    try:
        return json.loads(part.__getstate__())
    except Exception:  # a custom component of the caller's own program
        return None


def is_plain_expression(expression: str) -> bool:
    """Whether a regular expression repeats nothing but characters and classes, and few of them in an alternative."""
    bare = _ESCAPE_OR_CLASS.sub(
        lambda found: "x" if not re.match(r"\\[1-9k]", found[0]) else found[0], expression
    )
    if _REPEATED_GROUP.search(bare):
        return False
    return all(len(_REPEAT.findall(alternative)) <= _MOST_REPEATS for alternative in bare.split("|"))


def _components(described: Any) -> Iterator[dict[str, Any]]:
    if isinstance(described, dict):
        yield described
    values = described.values() if isinstance(described, dict) else described
    if isinstance(described, (dict, list)):
        for value in values:
            if isinstance(value, (dict, list)):
                yield from _components(value)


def _expressions(described: Any) -> list[str]:
    patterns = [c.get("pattern") for c in _components(described)]
    return [str(pattern["Regex"]) for pattern in patterns if isinstance(pattern, dict) and "Regex" in pattern]


def _growth(described: dict[str, Any]) -> float:
    """How many times as long the replacements before the model, or those after it, may make a text."""
    factors = []
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",)):
        factor = 1.0
        for part in parts:
            for component in _components(described.get(part)):
                content = component.get("content", component.get("replacement"))
                if component.get("type") in {"Replace", "Metaspace"} and isinstance(content, str):
                    pattern = component.get("pattern")
                    matched = pattern.get("String") if isinstance(pattern, dict) else None
                    factor *= max(1.0, len(content) / max(1, len(matched) if isinstance(matched, str) else 1))
                elif component.get("type") == "Prepend" and isinstance(component.get("prepend"), str):
                    factor *= max(1.0, len(component["prepend"]))
        factors.append(min(factor, 1e12))
    return max(factors)
