"""Where a run lives and what it continues from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import TrainConfig
from ..parallel.launch import scheduled_run_id
from ..parallel.ranks import say
from ..runs import CHECKPOINTS, new_run_id, runs_newest_first
from .folder import (
    BEST,
    LAST,
    best_checkpoint,
    damage,
    is_checkpoint,
    named_checkpoint,
    newest_sound_checkpoint,
)


@dataclass(frozen=True)
class Place:
    """Where a run lives and what it continues from."""

    root: Path
    run_id: str
    checkpoint: Path | None

    @property
    def run_dir(self) -> Path:
        return self.root / self.run_id


def find_place(config: TrainConfig) -> Place:
    """Decide the run's directory and the checkpoint it continues from; nothing is written yet.

    Raises:
        FileNotFoundError: ``ckpt_path`` names a file that is not there.
        ValueError: it names a folder without a checkpoint.
    """
    assert config.name is not None
    root = Path(config.runs_dir) / config.name
    if config.ckpt_path is None:
        run_id = new_run_id()
        if run_id != scheduled_run_id():
            return Place(root, run_id, None)
        # A job that SLURM puts into the queue again goes on in its own directory.
        return Place(root, run_id, newest_sound_checkpoint(root / run_id / CHECKPOINTS))
    if config.ckpt_path == LAST:
        for run in runs_newest_first(root):
            checkpoint = newest_sound_checkpoint(run / CHECKPOINTS)
            if checkpoint is not None:
                return Place(root, run.name, checkpoint)
        say(f"ckpt_path=last: no run below {root} has a complete checkpoint; starting afresh.")
        return Place(root, new_run_id(), None)
    if config.ckpt_path == BEST:
        for run in runs_newest_first(root):
            if best_checkpoint(run / CHECKPOINTS) is not None:
                return find_place_of(config, run / BEST)
        raise ValueError(
            f"ckpt_path=best: no run below {root} kept a best checkpoint, as callbacks.checkpoint.monitor=val/loss "
            "makes it; give last, or a checkpoint."
        )
    path = Path(config.ckpt_path)
    path = named_checkpoint(path) or path
    if not path.exists():
        raise FileNotFoundError(
            f"ckpt_path={path} does not exist; give a checkpoint, a run directory, last or best."
        )
    if is_checkpoint(path):
        if problem := damage(path):
            raise ValueError(
                f"ckpt_path={path} is damaged, or no checkpoint ({problem}); give the checkpoint before it, or last."
            )
        # A checkpoint inside one of this experiment's runs is continued there, another in a run of its own.
        folder = path.resolve().parent
        inside = folder.name == CHECKPOINTS and folder.parent.parent == root.resolve()
        return Place(root, folder.parent.name if inside else new_run_id(), path)
    checkpoint = newest_sound_checkpoint(path / CHECKPOINTS) or newest_sound_checkpoint(path)
    if checkpoint is None:
        raise ValueError(
            f"ckpt_path={path} holds no complete checkpoint; give a .ckpt or .shards, a run directory, or last."
        )
    return find_place_of(config, checkpoint)


def find_place_of(config: TrainConfig, checkpoint: Path) -> Place:
    """The place of a run that continues from one checkpoint file."""
    from dataclasses import replace

    return find_place(replace(config, ckpt_path=str(checkpoint)))
