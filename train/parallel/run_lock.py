"""One run, one writer: a run directory belongs to the process that trains in it.

``RUN/.writer`` names that process; it is touched every few seconds. A second writer is refused with the name of the
first. A dead owner blocks nobody: on its own machine the process is looked up, and the lock of another machine counts
only if it is touched while one watches, which takes no clocks that agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..files import discard, hidden_name, host_name, is_alive, process_start, write_atomically, writing

NAME = ".writer"
BEAT = 2.0
# Several beats: a busy file server delays some.
PATIENCE = 15.0


class RunLock:
    """This process's claim on a run directory, from :meth:`take` to the end of a ``with`` block."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._own: dict[str, Any] = {}

    def take(self) -> None:
        """Claim the directory, which exists.

        Raises:
            ValueError: another process trains there; it is named.
            NotWrittenError: nothing can be written there.
        """
        self._own = {
            "host": host_name(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        }
        staged = hidden_name(self.path)
        try:
            write_atomically(staged, json.dumps(self._own))
            while True:
                refuse_if_held(self.path.parent)
                discard(self.path)
                with writing(self.path), contextlib.suppress(FileExistsError):
                    os.link(staged, self.path)  # of two that come at once, one
                    break
        finally:
            discard(staged)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._touch, name="run-lock", daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):  # a full disk, a file server that is away: later
                if _read(self.path) == self._own:
                    os.utime(self.path)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the directory up; harmless where it was never claimed."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(BEAT)
            self._thread = None
            if _read(self.path) == self._own:
                discard(self.path)


def refuse_if_held(run_dir: Path) -> None:
    """See that no living process trains in a run directory; takes :data:`PATIENCE` where another machine did.

    Raises:
        ValueError: one does; it is named.
    """
    path = run_dir / NAME
    owner = _read(path)
    if owner is None:
        return
    if owner["host"] == host_name():
        held = owner["pid"] != os.getpid() and is_alive(owner["pid"], owner["start"])
    else:
        held = _is_touched(path)
    if held:
        raise ValueError(
            f"{run_dir} is being written by process {owner['pid']} on {owner['host']} since {owner['since']}; wait for "
            "it, stop it, or start a run of its own (without ckpt_path, or with another name=)."
        )


def _is_touched(path: Path) -> bool:
    end, first = time.monotonic() + PATIENCE, _touched(path)
    while first is not None and time.monotonic() < end:
        time.sleep(min(0.5, BEAT))
        if _touched(path) != first:
            return _touched(path) is not None
    return False


def _touched(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening asks the server of a network disk anew
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    """The owner that a lock names; None where there is none, or a file that names nobody."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            "host": str(found["host"]),
            "pid": int(found["pid"]),
            "start": found["start"],
            "since": found["since"],
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
