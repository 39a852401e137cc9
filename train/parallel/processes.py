"""Processes that end with the one that started them, in whatever way that one ends.

A worker whose parent was killed is told by nobody. Each asks the kernel to be killed with its parent
(:func:`end_with_parent`). A parent that ends in order, an uncaught exception included, ends its own
(:func:`end_at_exit`): multiprocessing asks with SIGTERM, which workers of a run must ignore, and waits for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import util
from typing import Any

_PR_SET_PDEATHSIG = 1
_WAIT = 5.0


def end_with_parent() -> None:
    """Have this process killed when the one that started it is gone; called first thing by a worker.

    Where the kernel's parent is another (a fork server, which outlives it), or cannot be asked, a thread waits for it.
    """
    try:
        asked = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    except (OSError, AttributeError):
        asked = False
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if not parent.is_alive():  # gone before it was asked
        os._exit(1)
    if not asked or os.getppid() != parent.pid:
        threading.Thread(target=_follow, args=(parent,), name="follow-parent", daemon=True).start()


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def end_at_exit(processes: Sequence[Any]) -> None:
    """Kill those of ``processes`` that still run when this process leaves, an uncaught exception included."""
    # With a priority it runs before multiprocessing joins its children, in forked processes too.
    util.Finalize(None, _end, args=(list(processes),), exitpriority=100)


def _end(processes: Sequence[Any]) -> None:
    with contextlib.suppress(ValueError):  # PyTorch's handler would raise for each worker that ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(_WAIT)
