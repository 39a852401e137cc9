"""``interloom eval``."""

from __future__ import annotations

import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..config import EvalConfig, plain, typed
from ..messages import without_secrets
from ..parallel.launch import adopt_launcher, become_torchrun
from ..runs import show_scores
from .hydra_run import run


def evaluate(arguments: list[str]) -> int:
    """``interloom eval task=… checkpoint=… data=…``.

    ``data`` is a group of configurations for `train`; here it is a path, so it is passed on as ``data_path``.
    """
    renamed = ["data_path=" + a.removeprefix("data=") if a.startswith("data=") else a for a in arguments]
    return run(renamed, "eval", _evaluate)


def _evaluate(config: DictConfig) -> int:
    settings = typed(config)
    assert isinstance(settings, EvalConfig)
    from ..evaluation.ranks import check_count, rank_and_count, ranks_of
    from ..evaluation.tasks import check_task, run_task

    task = check_task(settings.task)
    if settings.checkpoint is None:
        raise ValueError(
            "checkpoint is not set; give checkpoint=RUN_DIR, a .ckpt or a save_pretrained folder."
        )
    from ..checkpointing.load import model_type
    from ..files import write_atomically
    from ..runs import CONFIG, create_run, new_run_id, point_latest, write_environment, write_metrics

    model_type(settings.checkpoint)  # whether it is to be had, before anything else is read
    check_count(task, settings.devices)
    _launch_evaluation(settings.devices)
    choice = HydraConfig.get().runtime.choices.get("task")
    root = Path(settings.runs_dir) / (settings.name or f"eval_{choice}")
    run_id = new_run_id()
    run_dir = root / run_id
    try:
        with ranks_of(task):
            first = rank_and_count()[0] == 0
            if first:  # before the work: a place that cannot be written to is not found out after hours of it
                create_run(root, run_id, checkpoints=False, latest=False)
            scores = run_task(
                settings.task, checkpoint=settings.checkpoint, data=settings.data_path, output_dir=run_dir
            )
    except BaseException:
        _remove_if_empty(run_dir)
        raise
    if not first:
        return 0
    point_latest(root, run_id)
    write_atomically(run_dir / CONFIG, without_secrets(OmegaConf.to_yaml(OmegaConf.create(plain(config)))))
    write_environment(run_dir, list(HydraConfig.get().overrides.task))
    write_metrics(run_dir, scores)
    show_scores(run_dir)
    return 0


def _launch_evaluation(devices: int) -> None:
    """Start again in ``devices`` processes where no launcher has."""
    if devices < 1:
        raise ValueError(f"devices={devices} must be 1 or more.")
    launched = adopt_launcher()
    if launched > 1 and devices not in {1, launched}:
        raise ValueError(
            f"devices={devices} but {launched} processes were started; make both the same or leave devices out."
        )
    if launched > 1 or devices == 1:
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError("a sweep (-m) runs in one process; give devices without -m, or -m without devices.")
    become_torchrun(devices, sys.argv[1:], module="interloom.train.evaluation")


def _remove_if_empty(folder: Path) -> None:
    for path in (folder, folder.parent, folder.parent.parent):
        if path != Path() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
