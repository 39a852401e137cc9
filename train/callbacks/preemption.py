"""Stopping when asked to: SIGTERM, SIGUSR1 or Ctrl-C to any one rank stops all of them at the same step, saved.

A handler must not do anything but remember: Lightning's own save inside theirs, or broadcast from rank 0 alone, and
hang or lose the checkpoint when another rank gets the signal. Here the flag is looked at once a step, the ranks
agree by a maximum, and all leave the loop together after that step; the checkpoint callback saves as at the end of a
run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..exit_codes import INTERRUPTED, STOPPED
from ..parallel.launch import in_submitit_job
from ..parallel.stop_requests import INTERRUPT, REQUEUE, STOP, StopRequests

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One Ctrl-C reaches a rank twice, from the terminal and from the agent that passes signals on.
ONE_PRESS_SECONDS = 1.0


class Preempted(Exception):
    """The run was asked to stop and has saved; ``step`` is where it goes on, ``request`` who asked."""

    def __init__(self, step: int, request: int = STOP) -> None:
        super().__init__(f"stopped on request at step {step}, saved; ckpt_path=last continues")
        self.step, self.requeue = step, request == REQUEUE
        self.exit_code = INTERRUPTED if request == INTERRUPT else STOPPED


class PreemptionCallback(Callback):
    """Ends training after the current step when this process or that of another rank gets a signal.

    Further signals change nothing, also while the last checkpoint is written and until :meth:`restore` puts the
    handlers from before :meth:`listen` back; only a second Ctrl-C quits at once. In a submitit job SIGUSR2 is what
    announces the end of its time. After ``max_seconds`` from now the run is asked to stop, too.
    """

    def __init__(self, requests: StopRequests, max_seconds: float | None = None) -> None:
        self.requests = requests
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._pressed: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requests.ask(REQUEUE if number == signal.SIGUSR2 else STOP)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._pressed is None:
            self._pressed = now
            self.requests.ask(INTERRUPT)
            _write("\nstopping after this step and saving; Ctrl-C again quits at once, without saving\n")
        elif now - self._pressed > ONE_PRESS_SECONDS:
            _write("\nquit without saving; ckpt_path=last continues from the last checkpoint\n")
            os._exit(INTERRUPTED)  # Lightning would turn an exception into exit code 1, after a long teardown

    def listen(self) -> None:
        """Heed signals from now on; one that comes before the first step stops the run after it."""
        try:
            for number in (*SIGNALS, *((signal.SIGUSR2,) if in_submitit_job() else ())):
                self._before[number] = signal.signal(number, self._ask)
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread of the process: whoever owns that handles signals
            self._before.clear()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.requests.ask(STOP)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.requests.agreed:
            trainer.should_stop = True

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _write(line: str) -> None:
    """Print from a signal handler, where a buffered stream may be in the middle of another line; from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, line.encode())
