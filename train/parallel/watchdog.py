"""No rank waits for ever: when steps stop coming, say which rank holds the others up, and end.

A collective has no answer to a rank that never comes: gloo waits for half an hour and names a socket, NCCL for ten
minutes and names a sequence number. Here a thread of every rank writes down, in the store through which the ranks
found one another, how far its rank is and, when that is late, where in the code it stands. After
``trainer.stuck_timeout`` seconds without a step each late rank reads what the others wrote and prints a verdict:
a rank that writes no more is dead or stopped; else it is the one with the least progress, and among equals the
one that is *not* waiting in a collective. Then the process ends, and its launcher ends the others.

The cost is a note in a variable at two places of a step, and one message to the store every few seconds. On GPUs,
where collectives run beside Python, a rank that hangs inside a kernel looks like those that wait for it: the
verdict then lists every rank's place and blames none.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

from ..exit_codes import FAULT
from ..messages import tell

BETWEEN, COMPUTING = 0, 1
_DOING = {BETWEEN: "between steps", COMPUTING: "computing"}
_LISTED = 8


class Store(Protocol):
    """What is used of a :class:`torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Report:
    """How far a rank is: optimiser steps done, what it does, seconds since that began, where its code stands.

    ``beat`` counts the reports of a rank, so that a reader sees whether it still sends any.
    """

    step: int
    phase: int
    age: float
    place: str
    waiting: bool
    beat: int

    def __str__(self) -> str:
        doing = "waiting in a collective" if self.waiting else _DOING[self.phase]
        return f"{doing} at step {self.step} since {self.age:.0f} s, {self.place}"


def verdict(reports: Mapping[int, Report | None], silent: Sequence[int], timeout: float) -> str:
    """Say which ranks hold the others up.

    Args:
        reports: rank to its last report; None where there never was one.
        silent: ranks that have stopped reporting.
        timeout: seconds after which this was asked.
    """
    known = {rank: report for rank, report in reports.items() if report is not None}
    step = max((report.step for report in known.values()), default=0)
    gone = sorted({*silent, *(rank for rank, report in reports.items() if report is None)})
    if gone:
        blamed, why = gone, "no sign of life: killed, stopped or cut off"
    else:
        least = min((report.step, report.phase) for report in known.values())
        blamed = [rank for rank, report in known.items() if (report.step, report.phase) == least]
        busy = [rank for rank in blamed if not known[rank].waiting]
        blamed, why = sorted(busy or blamed), "the others wait"
        if len(blamed) == len(reports):
            blamed, why = [], "all ranks are equally far"
    lines = [f"stuck at step {step}: no progress for {timeout:.0f} s ({why})."]
    if blamed:
        lines[0] = f"stuck at step {step}: {_named(blamed)} held the others up for {timeout:.0f} s ({why})."
    order = [*blamed, *(rank for rank in sorted(reports) if rank not in blamed)]
    for rank in order[:_LISTED]:
        lines.append(f"  rank {rank}: {reports[rank] or 'never reported'}")
    if len(order) > _LISTED:
        lines.append(f"  … and {len(order) - _LISTED} more ranks")
    lines.append(
        "ckpt_path=last continues from the last checkpoint; trainer.stuck_timeout=SECONDS allows slower steps."
    )
    return "\n".join(lines)


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_LISTED])) + (" …" if len(ranks) > _LISTED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands, as ``file:line in function``, and whether that is inside ``torch.distributed``."""
    waiting = False
    innermost = True
    while frame is not None:
        name = frame.f_code.co_filename
        library = f"{os.sep}torch{os.sep}" in name
        if innermost:
            waiting = library and f"{os.sep}distributed{os.sep}" in name
        innermost = False
        if not library:  # the line of ours that called into PyTorch says more than PyTorch's own
            short = os.sep.join(name.split(os.sep)[-2:])
            return f"{short}:{frame.f_lineno} in {frame.f_code.co_name}", waiting
        frame = frame.f_back
    return "unknown place", waiting


class Watchdog:
    """The thread of one rank.

    Args:
        store: shared by all ranks.
        rank, world_size: whose.
        timeout: seconds without progress after which it speaks.
        end: called after the verdict is printed; ends the process.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        timeout: float,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.end = end
        self.interval = min(10.0, timeout / 4)
        self._watched = threading.get_ident()
        self._progress = (0, BETWEEN, time.monotonic())
        self._beat = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def mark(self, step: int, phase: int) -> None:
        """Note progress of the thread that made this object."""
        self._progress = (step, phase, time.monotonic())

    def start(self) -> None:
        """Begin to report and to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; no verdict comes afterwards."""
        self._stopped.set()
        self._thread.join(self.interval)

    def report(self) -> Report:
        """This rank's own state."""
        step, phase, since = self._progress
        age = time.monotonic() - since
        place, waiting = "", False
        if age > self.timeout / 2:
            place, waiting = place_of(sys._current_frames().get(self._watched))
        self._beat += 1
        return Report(step, phase, age, place, waiting, self._beat)

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            try:
                own = self.report()
                self._send(own)
                if own.age < self.timeout:
                    continue
                before = self._read()
                # Long enough for every living rank to report again.
                if self._stopped.wait(1.5 * self.interval):
                    return
                self._send(self.report())
                after = self._read()
            except RuntimeError as error:  # the rank that keeps the store is gone
                if self._stopped.is_set() or self._fresh():
                    continue
                self._speak(
                    f"stuck at step {self._progress[0]}: the store that the launcher or rank 0 keeps does not answer "
                    f"({str(error).splitlines()[0]}); that process is dead, stopped or cut off."
                )
                return
            if self._stopped.is_set() or self._fresh():
                continue
            silent = [rank for rank, report in after.items() if report is not None and report == before[rank]]
            self._speak(verdict(after, silent, self.timeout))
            return

    def _fresh(self) -> bool:
        return time.monotonic() - self._progress[2] < self.timeout

    def _speak(self, message: str) -> None:
        tell(f"ERROR: rank {self.rank}: {message}")
        self.end(FAULT)

    def _send(self, report: Report) -> None:
        self.store.set(f"watchdog/{self.rank}", json.dumps(asdict(report)))

    def _read(self) -> dict[int, Report | None]:
        keys = [f"watchdog/{rank}" for rank in range(self.world_size)]
        if self.store.check(keys):
            values: list[bytes | None] = list(self.store.multi_get(keys))
        else:
            values = [self.store.get(key) if self.store.check([key]) else None for key in keys]
        return {rank: Report(**json.loads(value)) if value else None for rank, value in enumerate(values)}
