"""The watchdog of a training run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from ..parallel.watchdog import BETWEEN, COMPUTING, Watchdog


class WatchdogCallback(Callback):
    """Runs a :class:`Watchdog` while a run of several ranks trains."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._watchdog: Watchdog | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        # A connection of its own: the main thread may be waiting on the other.
        store: Any = dist.distributed_c10d._get_default_store()
        self._watchdog = Watchdog(store.clone(), trainer.global_rank, trainer.world_size, self.timeout)
        self._watchdog.mark(trainer.global_step, BETWEEN)
        self._watchdog.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._watchdog is not None:
            self._watchdog.mark(trainer.global_step, COMPUTING)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._watchdog is not None:
            self._watchdog.mark(trainer.global_step, BETWEEN)

    def mark(self, step: int) -> None:
        """There is progress between two steps: in a validation, say."""
        if self._watchdog is not None:
            self._watchdog.mark(step, BETWEEN)

    def stop(self) -> None:
        """End the thread: nothing is waited for any more."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
