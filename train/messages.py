"""Lines to the user, on stderr."""

from __future__ import annotations

import contextlib
import sys


def tell(message: str) -> None:
    """Print a line; where even that finds the disk full (the log may lie on it), training is not to end for it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
