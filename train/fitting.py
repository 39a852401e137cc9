"""One training run from its typed configuration, in three calls: prepare, train, finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, Trainer

from .callbacks.checkpoint import CheckpointCallback
from .callbacks.loggers import build_loggers
from .callbacks.metrics import MetricsCallback
from .callbacks.preemption import Preempted, PreemptionCallback
from .callbacks.progress import ProgressCallback
from .callbacks.run_start import StartRun
from .callbacks.watchdog import WatchdogCallback
from .checkpointing.export import export
from .checkpointing.resume import Place, find_place
from .config import TrainConfig
from .data.loader import worker_lost
from .data.report import SkipReport
from .data.steps import Steps
from .evaluation.tasks import check_task, run_task
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
    run = prepare(config, resolved_yaml=resolved_yaml, overrides=overrides, notes=notes)
    # From the directory's making to the last line in it this process is the one that writes there.
    with run.starter.lock:
        train(run)
        finish(run)
    return run.place.run_dir


@dataclass
class PreparedRun:
    """Everything a run needs, built and checked; nothing of it is on the disk yet."""

    config: TrainConfig
    place: Place
    loader: Any
    module: TrainingModule
    trainer: Trainer
    starter: StartRun
    metrics: MetricsCallback
    saver: CheckpointCallback
    preemption: PreemptionCallback
    watchdog: WatchdogCallback


def prepare(
    config: TrainConfig, *, resolved_yaml: str, overrides: list[str], notes: Sequence[str] = ()
) -> PreparedRun:
    """Build loader, model and trainer of a run; arguments and errors as of :func:`fit`."""
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
    global_batch, run_dir, wanted = loader.global_batch_size, place.run_dir, config.callbacks
    module.run_id = place.run_id
    module.skipped_steps = run_dir / SKIPPED_STEPS
    module.stop_requests = StopRequests()
    metrics = MetricsCallback(run_dir / METRICS_TABLE, log_every=wanted.log_every, global_batch=global_batch)
    saver = CheckpointCallback(
        run_dir / CHECKPOINTS,
        every_steps=wanted.checkpoint.every_steps,
        keep=wanted.checkpoint.keep,
        sharded=in_shards,
    )
    preemption = PreemptionCallback(module.stop_requests)
    watchdog = WatchdogCallback(config.trainer.stuck_timeout)
    starter = StartRun(place, resolved_yaml, overrides, notes)
    # The directory is made first, and a step's row is written before its checkpoint: the table is never behind it.
    callbacks: list[Callback] = [starter, watchdog, metrics, saver, preemption]
    if wanted.samples.every_steps and objective.samples is not None:
        callbacks.append(objective.samples(config, run_dir))
    if wanted.progress:
        callbacks.append(ProgressCallback(max_steps=config.trainer.max_steps, global_batch=global_batch))
    trainer = build_trainer(
        config.trainer, callbacks=callbacks, loggers=build_loggers(config, run_dir), root=config.runs_dir
    )
    return PreparedRun(config, place, loader, module, trainer, starter, metrics, saver, preemption, watchdog)


def train(run: PreparedRun) -> None:
    """Run the steps, from the checkpoint where there is one.

    Raises:
        Preempted: a signal asked the run to stop, and it is saved.
    """
    if run.place.checkpoint is not None:
        say(f"continuing {run.place.run_dir} from {run.place.checkpoint.name}")
    run.preemption.listen()
    try:
        run.trainer.fit(
            run.module,
            train_dataloaders=Steps(run.loader, run.module, run.config.trainer.overfit_batches),
            ckpt_path=run.place.checkpoint,
            weights_only=True,
        )
    except RuntimeError as error:
        if fault := worker_lost(error) or rank_lost(error):
            raise fault from error
        raise
    finally:
        run.watchdog.stop()
        run.preemption.restore()
    if request := run.module.stop_requests.agreed:
        raise Preempted(run.trainer.global_step, request)


def finish(run: PreparedRun) -> None:
    """Export the model, write the scores, evaluate where a ``task`` is set, and say what was lost."""
    results = {"train/steps": float(run.trainer.global_step), **run.metrics.summary}
    if run.saver.seconds:
        results["train/checkpoint_seconds"] = median(run.saver.seconds)
    # Every rank takes part in these three, also in what rank 0 alone then writes.
    weights = run.module.full_weights()
    lost = gathered(run.loader.report.to_dict())
    retried = sum(gathered(run.loader.retried))
    if not run.trainer.is_global_zero:
        return
    run_dir = run.place.run_dir
    export(run.module, weights, run_dir / MODEL)
    write_metrics(run_dir, results)
    if run.config.task:
        scores = run_task(run.config.task, checkpoint=run_dir / MODEL, data=None, output_dir=run_dir)
        write_metrics(run_dir, scores)
    report = SkipReport()
    for part in lost:
        report.merge(part)
    for line in report.lines() if report.skipped else ():
        say(line)
    if retried:
        say(f"servers of remote shards were asked again {retried} times; nothing was lost by it")
