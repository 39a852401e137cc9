"""Stopping when asked to: SIGTERM or SIGUSR1 to any one rank stops all of them at the same step, saved.

A handler must not do anything but remember: Lightning's own save inside theirs, or broadcast from rank 0 alone, and
hang or lose the checkpoint when another rank gets the signal. Here the flag is looked at between steps, the ranks
agree by a maximum, and all leave the loop together; the checkpoint callback saves as at the end of a run.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 143  # 128 + SIGTERM: schedulers read it as "stopped on request", not as success or failure


class Preempted(Exception):
    """The run was asked to stop and has saved; ``step`` is where it goes on."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on request at step {step}, saved; ckpt_path=last continues")
        self.step = step


class PreemptionCallback(Callback):
    """Ends training after the current step when this process or that of another rank gets a signal.

    Further signals change nothing. The handlers before are put back afterwards.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread of the process: whoever owns that handles signals
            self._before.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.stopped and self._agreed(pl_module.device):
            self.stopped = True
            trainer.should_stop = True

    def _agreed(self, device: torch.device) -> bool:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._asked
        flag = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
