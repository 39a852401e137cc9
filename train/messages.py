"""Lines to the user, on stderr, and the error that becomes one of them with exit code 1."""

from __future__ import annotations

import contextlib
import sys


class OutsideFault(RuntimeError):
    """What neither the user nor this program did and what may pass: a server away, a process killed.

    One sentence, and exit code 1: a scheduler is to start the run again, a few times.
    """


def tell(message: str) -> None:
    """Print a line; where even that finds the disk full (the log may lie on it), training is not to end for it."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
