"""The run directory is made once everything else is known to work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback

from ..checkpointing.resume import Place
from ..files import write_atomically
from ..messages import tell, without_secrets
from ..parallel.ranks import from_rank_zero
from ..parallel.run_lock import RunLock
from ..runs import CONFIG, create_run, write_environment


class StartRun(Callback):
    """Makes the run directory once everything else is known to work: after the checkpoint is restored."""

    def __init__(self, place: Place, resolved_yaml: str, overrides: list[str], notes: Sequence[str]) -> None:
        self.place, self.resolved_yaml, self.overrides, self.notes = place, resolved_yaml, overrides, notes
        self.lock = RunLock(place.run_dir)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from_rank_zero(self._start)

    def _start(self) -> None:
        for note in self.notes:
            tell(note)
        run_dir = create_run(self.place.root, self.place.run_id, claim=self.lock.take)
        write_atomically(run_dir / CONFIG, without_secrets(self.resolved_yaml))
        write_environment(run_dir, self.overrides)
