"""Loggers beside ``metrics.csv``, the record of truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TrainConfig


def build_loggers(config: TrainConfig, run_dir: Path) -> list[Any]:
    """Loggers beside ``metrics.csv``: Weights & Biases where the config asks for it.

    Raises:
        ValueError: wandb is asked for but not installed.
    """
    if not config.logger.wandb:
        return []
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "logger=wandb needs the package wandb; install interloom[wandb] or use logger=csv."
        ) from error
    from lightning.pytorch.loggers import WandbLogger

    return [
        WandbLogger(
            project=config.logger.project,
            name=f"{config.name}/{run_dir.name}",
            id=run_dir.name,
            save_dir=config.runs_dir,
            offline=config.logger.offline,
            resume="allow",
        )
    ]
