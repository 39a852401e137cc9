"""Stopping when asked to: SIGTERM or SIGUSR1 to any one rank stops all of them at the same step, saved.

A handler must not do anything but remember: Lightning's own save inside theirs, or broadcast from rank 0 alone, and
hang or lose the checkpoint when another rank gets the signal. Here the flag is looked at once a step, the ranks
agree by a maximum, and all leave the loop together after that step; the checkpoint callback saves as at the end of a
run.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..launch import in_submitit_job
from ..module import TrainingModule

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 143  # 128 + SIGTERM: schedulers read it as "stopped on request", not as success or failure
STOP, REQUEUE = 1, 2


class Preempted(Exception):
    """The run was asked to stop and has saved; ``step`` is where it goes on, ``requeue`` whether by this job."""

    def __init__(self, step: int, requeue: bool = False) -> None:
        super().__init__(f"stopped on request at step {step}, saved; ckpt_path=last continues")
        self.step, self.requeue = step, requeue


class PreemptionCallback(Callback):
    """Ends training after the current step when this process or that of another rank gets a signal.

    Further signals change nothing, also while the last checkpoint is written and until :meth:`restore` puts the
    handlers from before :meth:`listen` back. In a submitit job SIGUSR2 is what announces the end of its time.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.requeue = False
        self._asked = 0
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = max(self._asked, REQUEUE if number == signal.SIGUSR2 else STOP)

    def listen(self) -> None:
        """Heed signals from now on; one that comes before the first step stops the run after it."""
        try:
            for number in (*SIGNALS, *((signal.SIGUSR2,) if in_submitit_job() else ())):
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread of the process: whoever owns that handles signals
            self._before.clear()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        pl_module.request = lambda: self._asked

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.stopped:
            return
        assert isinstance(pl_module, TrainingModule)
        if pl_module.requested:
            self.stopped, self.requeue = True, pl_module.requested == REQUEUE
            trainer.should_stop = True

    def restore(self) -> None:
        """Put back the handlers that were there before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
