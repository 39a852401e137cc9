"""Files that came from outside: bounded before they are read, and blamed for whatever they break.

A checkpoint or a data set may be made by anybody. Its text files are read here, so that one that is a device, too
large or nested without end is refused with a sentence, and :func:`blaming` turns what a wrong value inside breaks
further on (a TypeError, say) into one.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Settings are some kB; an index of weights or a vocabulary may have some ten MB.
MAX_SETTINGS = 64 * 2**20
MAX_SIDE = 4096  # pixels; a picture of that side takes 200 MB once it is a tensor
_BROKEN = (
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    MemoryError,
    UnicodeError,
)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what would never end, or wait for a writer, once it is opened.

    Raises:
        ValueError: the path leads to a pipe, a socket or a device; one to nothing or to a folder is left to the caller.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{os.fspath(path)} is a pipe, a socket or a device; expected a regular file.")


def read_bytes(path: Path, limit: int = MAX_SETTINGS) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: it is no regular file (a pipe or a device never ends), it is larger, or it cannot be read.
    """
    try:
        # Opened without blocking, so that a pipe nobody writes to is seen for what it is.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is not a regular file; expected a file of text.")
            # What grows while it is read (or says 0, as files of /proc) is bounded as well.
            content = file.read(limit + 1) if status.st_size <= limit else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    if status.st_size > limit or len(content) > limit:
        raise ValueError(f"{path} is larger than the {limit:,} bytes that such a file may have.")
    return content


def read_json(path: Path, limit: int = MAX_SETTINGS) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: it cannot be read (see :func:`read_bytes`) or is not JSON.
    """
    content = read_bytes(path, limit)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply; restore it.") from None
    except ValueError as error:  # not JSON, not UTF-8, or a number of more digits than Python reads
        raise ValueError(
            f"{path} cannot be read as JSON, for it is not valid JSON ({error}); restore it."
        ) from error


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a JSON file.

    Raises:
        ValueError: as :func:`read_json`, or its value is no object.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object of settings.")
    return values


@contextmanager
def blaming(source: object, advice: str = "restore it") -> Iterator[None]:
    """What breaks inside is the fault of ``source``: a ValueError that names it, in the place of any other error.

    Errors that carry a sentence already (ValueError) pass, and so do those of the machine (OSError, a device that
    is out of memory).
    """
    try:
        yield
    except _BROKEN as error:
        if type(error).__name__ in {"OutOfMemoryError", "AcceleratorError", "OutsideFault"}:
            raise
        raise ValueError(_sentence(source, error, advice)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, no Exception to Python
            raise
        raise ValueError(_sentence(source, error, advice)) from error


def _sentence(source: object, error: BaseException, advice: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:200].rstrip('.')}" if lines else type(error).__name__
    return f"{source} is damaged or holds a value of the wrong kind ({reason}); {advice}."


def check_preprocessing(
    source: object, sides: Sequence[Any], mean: Sequence[Any], std: Sequence[Any], resample: Any
) -> None:
    """Check the settings of a file that says how pictures become tensors.

    Raises:
        ValueError: a side is no number of pixels or larger than ``MAX_SIDE``, or means, deviations or filter are not
            what they should be.
    """
    if not sides or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(
            f"{source} asks for pictures of {list(sides)} pixels, expected 1 to {MAX_SIDE:,} a side."
        )
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != 3 or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(f"{source} has {name} {list(values)!r}, expected three numbers.")
    if not all(std):
        raise ValueError(f"{source} has an image_std of 0, expected positive numbers.")
    if resample not in range(6):
        raise ValueError(f"{source} has resample={resample!r}, expected 0 to 5 (3 is bicubic).")
