"""One training run from its typed configuration: build everything, then make the directory, then train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from .callbacks.checkpoint import CheckpointCallback
from .callbacks.metrics import MetricsCallback
from .callbacks.preemption import Preempted, PreemptionCallback
from .callbacks.progress import ProgressCallback
from .callbacks.run_start import StartRun
from .callbacks.watchdog import WatchdogCallback
from .checkpointing.resume import find_place
from .config import TrainConfig
from .data.loader import worker_lost
from .data.report import SkipReport
from .files import check_room, staged_folder
from .objectives.families import objective_of
from .objectives.training_step import TrainingModule
from .parallel.host_memory import keep_freed_memory
from .parallel.ranks import from_rank_zero, gathered, in_turns, rank_lost, ranks, say, start_ranks
from .parallel.run_lock import refuse_if_held
from .parallel.sharding import Sharder
from .parallel.stop_requests import StopRequests
from .runs import CHECKPOINTS, METRICS_TABLE, MODEL, SKIPPED_STEPS, write_metrics
from .trainer import accelerator_of, build_trainer


def fit(config: TrainConfig, *, resolved_yaml: str, overrides: list[str], notes: Sequence[str] = ()) -> Path:
    """Train, export the model, evaluate it where a ``task`` is set; return the run directory.

    Args:
        config: the typed configuration.
        resolved_yaml: the same as text, for ``config.yaml``.
        overrides: what was given on the command line.
        notes: lines for the user, said once everything is known to work.

    Raises:
        ValueError: something in the configuration cannot work; no run directory is left behind.
        Preempted: a signal asked the run to stop, and it is saved.
    """
    from .evaluation.tasks import check_task, run_task

    accelerator = accelerator_of(config.trainer)
    if accelerator == "cpu":
        keep_freed_memory()
    start_ranks(config.trainer, accelerator)
    rank, world_size = ranks()
    objective = objective_of(config)
    if config.task:
        check_task(config.task)
    place = from_rank_zero(lambda: find_place(config))
    from_rank_zero(lambda: refuse_if_held(place.run_dir))
    loader = objective.loader(config, rank=rank, world_size=world_size)
    in_shards = config.trainer.strategy == "fsdp2" and world_size > 1
    sharder = Sharder.over_all_ranks(config.trainer) if in_shards else None

    def build() -> TrainingModule:
        module = objective.module(config, fingerprint=loader.fingerprint())
        if sharder is not None:
            module.shard(sharder)
        return module

    # The whole model is in a machine's memory before it is cut up: in turns, once and not once a rank.
    module = in_turns(build, config.trainer.devices) if in_shards else build()
    global_batch = loader.global_batch_size

    run_dir = place.run_dir
    module.run_id = place.run_id
    module.skipped_steps = run_dir / SKIPPED_STEPS
    metrics = MetricsCallback(
        run_dir / METRICS_TABLE, log_every=config.callbacks.log_every, global_batch=global_batch
    )
    saver = CheckpointCallback(
        run_dir / CHECKPOINTS,
        every_steps=config.callbacks.checkpoint.every_steps,
        keep=config.callbacks.checkpoint.keep,
        sharded=in_shards,
    )
    requests = module.stop_requests = StopRequests()
    preemption = PreemptionCallback(requests)
    watchdog = WatchdogCallback(config.trainer.stuck_timeout)
    callbacks: list[Callback] = [watchdog, metrics, saver, preemption]
    if config.callbacks.samples.every_steps and objective.samples is not None:
        callbacks.append(objective.samples(config, run_dir))
    if config.callbacks.progress:
        callbacks.append(ProgressCallback(max_steps=config.trainer.max_steps, global_batch=global_batch))
    starter = StartRun(place, resolved_yaml, overrides, notes)
    trainer = build_trainer(
        config.trainer,
        callbacks=[starter, *callbacks],
        loggers=build_loggers(config, run_dir),
        root=config.runs_dir,
    )
    if place.checkpoint is not None:
        say(f"continuing {run_dir} from {place.checkpoint.name}")
    with starter.lock:
        preemption.listen()
        try:
            trainer.fit(
                module,
                train_dataloaders=Steps(loader, module, config.trainer.overfit_batches),
                ckpt_path=place.checkpoint,
                weights_only=True,
            )
        except RuntimeError as error:
            if fault := worker_lost(error) or rank_lost(error):
                raise fault from error
            raise
        finally:
            watchdog.stop()
            preemption.restore()
        if requests.agreed:
            raise Preempted(trainer.global_step, requests.agreed)
        results = {"train/steps": float(trainer.global_step), **metrics.summary}
        if saver.seconds:
            results["train/checkpoint_seconds"] = median(saver.seconds)
        weights = module.full_weights()
        report = SkipReport()
        for lost in gathered(loader.report.to_dict()):
            report.merge(lost)
        retried = sum(gathered(loader.retried))
        if trainer.is_global_zero:
            export(module, weights, run_dir / MODEL)
            write_metrics(run_dir, results)
            if config.task:
                write_metrics(
                    run_dir, run_task(config.task, checkpoint=run_dir / MODEL, data=None, output_dir=run_dir)
                )
            for line in report.lines() if report.skipped else ():
                say(line)
            if retried:
                say(f"servers of remote shards were asked again {retried} times; nothing was lost by it")
    return run_dir


class Steps:
    """A loader that begins at the trainer's step; what Lightning iterates.

    Lightning asks for the iterator after it has restored ``global_step``, so nothing else need be saved.
    """

    def __init__(self, loader: Any, module: TrainingModule, overfit_batches: int) -> None:
        self.loader, self.module, self.overfit_batches = loader, module, overfit_batches

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        self.loader.start_step = self.module.trainer.global_step
        if not self.overfit_batches:
            return iter(self.loader)
        return self._repeated()

    def _repeated(self) -> Any:
        import itertools

        step = self.loader.start_step
        self.loader.start_step = 0
        batches = list(itertools.islice(iter(self.loader), self.overfit_batches))
        for index in range(step, len(self.loader)):
            yield batches[index % len(batches)]


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


def export(module: TrainingModule, weights: dict[str, Tensor] | None, folder: Path) -> None:
    """Write the trained model and its processor as a ``save_pretrained`` folder, in one rename."""
    state = module.export_state_dict(weights)
    needed = sum(tensor.nbytes for tensor in state.values())
    check_room(folder, needed)
    with staged_folder(folder, needed=needed) as staged:
        module.model.save_pretrained(staged, state_dict=state)  # type: ignore[operator]
        module.processor.save_pretrained(staged)  # type: ignore[operator]
