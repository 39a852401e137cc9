"""What Lightning iterates over: the loader from the step that a run goes on at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any


class Steps:
    """A loader that begins at the trainer's step; what Lightning iterates.

    Lightning asks for the iterator after it has restored ``global_step``, so nothing else need be saved.

    Args:
        loader: what yields a rank's share of each step from ``start_step`` on.
        module: the LightningModule, for its trainer's step.
        overfit_batches: repeat the first so many batches for ever; 0 for the real data.
    """

    def __init__(self, loader: Any, module: Any, overfit_batches: int) -> None:
        self.loader, self.module, self.overfit_batches = loader, module, overfit_batches

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.loader.start_step = self.module.trainer.global_step
        if not self.overfit_batches:
            return iter(self.loader)
        return self._repeated()

    def _repeated(self) -> Iterator[Any]:
        step = self.loader.start_step
        self.loader.start_step = 0
        batches = list(itertools.islice(iter(self.loader), self.overfit_batches))
        for index in range(step, len(self.loader)):
            yield batches[index % len(batches)]
