"""Being asked to stop before anything could hear it: while modules are imported and data are opened.

SIGUSR1 kills a process that has no handler for it, with a code that no scheduler reads as a stop. Nothing is
trained yet, so there is nothing to save, and the process ends at once as one that stopped on request.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from ..exit_codes import STOPPED


def heed_early_signals() -> None:
    """From now on SIGTERM and SIGUSR1 end this process with 143; a run that trains replaces the handlers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)


def fail_from_now_on() -> None:
    """A signal changes the exit code no more: srun and torchrun send one to the ranks that a lost rank takes along."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is _stop:
            # A handler would not do: leaving, the interpreter puts the system's own back.
            signal.signal(number, signal.SIG_IGN)


def _stop(number: int, frame: FrameType | None) -> None:
    text = f"stopped on request ({signal.Signals(number).name}) while nothing was being trained\n"
    try:
        os.write(2, text.encode())
    finally:
        os._exit(STOPPED)
