"""A progress bar for long evaluations, on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """Yield ``items`` while a bar on stderr shows how far they are and how long it takes."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.progress import track as bar

    from ..messages import console as new_console

    yield from bar(items, description=what, total=total, console=new_console(stderr=True), transient=True)
