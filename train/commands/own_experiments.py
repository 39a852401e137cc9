"""A user's own configuration files, given by ``--config-dir``: which of them a wrong name comes from."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_GLOBAL = re.compile(r"^\s*#\s*@package\s+_global_\s*$")


def own_files(arguments: list[str]) -> Iterator[Path]:
    """The files below ``--config-dir`` that the arguments choose, ``experiment=mine`` first of all."""
    folders = list(config_folders(arguments))
    for argument in arguments:
        group, equals, choice = argument.lstrip("+").partition("=")
        if not equals or argument.startswith("-"):
            continue
        for folder in folders:
            for name in choice.strip("[]").split(","):
                path = (folder / group / name.strip()).with_suffix(".yaml")
                if path.is_file():
                    yield path


def config_folders(arguments: list[str]) -> Iterator[Path]:
    for index, argument in enumerate(arguments):
        if argument in {"--config-dir", "-cd"} and index + 1 < len(arguments):
            yield Path(arguments[index + 1])
        elif argument.startswith("--config-dir="):
            yield Path(argument.partition("=")[2])


def own_file_named(name: str, arguments: list[str]) -> Path | None:
    """The own file that Hydra calls ``name``, such as ``experiment/mine``."""
    found = ((folder / name).with_suffix(".yaml") for folder in config_folders(arguments))
    return next((path for path in found if path.is_file()), None)


def check_encoding(arguments: list[str]) -> None:
    """Hydra reads UTF-8 alone, and its error names no file.

    Raises:
        ValueError: an own file that the arguments choose is something else.
    """
    for path in own_files(arguments):
        try:
            path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8.") from None


def missing_package_line(path: Path) -> str:
    """A sentence about an experiment whose settings Hydra puts below its group's name."""
    return (
        f"{path} does not begin with the line '# @package _global_', so its settings are not found at their places; "
        "add it as the first line."
    )


def is_global(path: Path) -> bool:
    """Whether a file's settings stand at their own places: Hydra's ``# @package _global_``, at its head."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return False
        if _GLOBAL.match(line):
            return True
    return False


def own_file_with(key: str, arguments: list[str]) -> Path | None:
    """The own file that a setting of this dotted name comes from; None where the command line names it itself."""
    if any(argument.lstrip("+").partition("=")[0] == key for argument in arguments):
        return None
    last = re.compile(rf"(?m)^\s*['\"]?{re.escape(key.rpartition('.')[2])}['\"]?\s*:")
    for path in own_files(arguments):
        if last.search(path.read_text(encoding="utf-8", errors="replace")):
            return path
    return None


def folder_of(path: str | Path) -> None:
    """Let modules beside a folder of own configurations be imported."""
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
