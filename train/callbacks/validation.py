"""Validation while a run trains, and what follows from it: the best checkpoint, and an early end.

The weights (their average, with ``optim.ema_decay``) are scored on ``data.val`` by the family's own validation. Nothing
of training moves: not its generators, nor its place in the data, nor a weight, so that a run with validation ends in
the bits of one without. What was best so far is part of every checkpoint. Stopped before a validation was done, the run
that goes on does it first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..checkpointing.monitored import Steering
from ..messages import tell
from ..parallel.ranks import agree, from_rank_zero
from .checkpoint import CheckpointCallback
from .metrics import MetricsCallback

PREFIX = "val/"


class Validation(Protocol):
    """A family's scores on ``data.val``; ``scores`` names them, without ``val/``."""

    scores: list[str]

    def __call__(self, module: Any, go_on: Callable[[], bool]) -> dict[str, float] | None: ...


class ValidationCallback(Callback):
    """Looks every ``every_steps`` steps and after the last: scores, then the best checkpoint, then the early end.

    Args:
        validation: None where only scores of training are monitored; those are looked at then.
        steering: what was best so far.
        patience: looks without a better value of ``steering.stopping`` before the run ends.
        save_best: keep the checkpoint of the best value of ``steering.checkpoint``.

    It must come before the callbacks that write metrics and checkpoints.
    """

    def __init__(
        self,
        validation: Validation | None,
        steering: Steering,
        *,
        every_steps: int,
        patience: int,
        save_best: bool,
        metrics: MetricsCallback,
        saver: CheckpointCallback,
        mark: Callable[[int], None],
    ) -> None:
        self.validation, self.steering = validation, steering
        self.every_steps, self.patience, self.save_best = every_steps, patience, save_best
        self.metrics, self.saver, self.mark = metrics, saver, mark
        self._begun = False

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return step > self.steering.looked and (step % self.every_steps == 0 or step == trainer.max_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enough():  # a run that ended early is gone on with: nothing is left to do
            trainer.should_stop = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._begun:
            self._begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._due(trainer) and not pl_module.stop_requests.agreed:
            self._look(trainer, pl_module, late=False)
        if self._enough():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._begun:  # nothing was left to train
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, module: Any) -> None:
        """Do what the run that is gone on with was stopped before, if anything."""
        self._begun = True
        if self._due(trainer) and trainer.global_step:
            self._look(trainer, module, late=True)
        self._point(trainer)

    def _enough(self) -> bool:
        stopping = self.steering.stopping
        return stopping is not None and stopping.since >= self.patience

    def _look(self, trainer: Trainer, module: Any, *, late: bool) -> None:
        step, begun = trainer.global_step, time.perf_counter()
        found: dict[str, float] = {}
        if self.validation is not None:
            scores = self._scores(trainer, module, step)
            if scores is None:
                return  # asked to stop: the run that goes on validates first
            found = {PREFIX + name: value for name, value in scores.items()}
        known = found | {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steering.looked = step
        stopping = self.steering.stopping
        if stopping is not None:
            stopping.look(self._monitored(stopping.monitor, known), step)
            if self._enough() and trainer.is_global_zero:
                tell(
                    f"{stopping.monitor} was not better than {stopping.value} of step {stopping.step} in "
                    f"{stopping.since} looks; the run ends at step {step}."
                )
        self.metrics.paused(time.perf_counter() - begun)
        if late:
            self.metrics.amend(trainer, step, found)
        elif found:
            self.metrics.add(found)
        best = self.steering.checkpoint
        if best is None:
            return
        before = best.state()
        if best.look(self._monitored(best.monitor, known), step) and self.save_best:
            self.saver.keep_best(step, lambda: vars(best).update(before))

    def _monitored(self, monitor: str, known: dict[str, float]) -> float:
        if monitor not in known:
            raise ValueError(
                f"callbacks monitor {monitor!r}, which this run does not have; it has {', '.join(sorted(known))}."
            )
        return from_rank_zero(lambda: known[monitor])

    def _scores(self, trainer: Trainer, module: Any, step: int) -> dict[str, float] | None:
        assert self.validation is not None
        requests = module.stop_requests

        def go_on() -> bool:
            self.mark(step)
            _, requests.agreed = agree(torch.ones((), dtype=torch.bool, device=module.device), requests.asked)
            return not requests.agreed

        average = module.average
        with (
            torch.no_grad(),
            unmoved(module),
            nullcontext() if average is None else average.in_place(),
            trainer.precision_plugin.forward_context(),
        ):
            module.eval()
            return self.validation(module, go_on)

    def _point(self, trainer: Trainer) -> None:
        best = self.steering.checkpoint
        if best is not None and best.step is not None and self.save_best and trainer.is_global_zero:
            self.saver.point_best(best.step)


@contextmanager
def unmoved(module: torch.nn.Module) -> Iterator[None]:
    """Put back every generator of random numbers and every module's mode afterwards."""
    modes = {part: part.training for part in module.modules()}
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for part, training in modes.items():
            part.training = training
