"""One training run from its typed configuration, in three calls: prepare, train, finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lightning.pytorch import Callback, Trainer

from .callbacks.checkpoint import CheckpointCallback
from .callbacks.loggers import LoggersCallback, build_loggers, closing, log_results
from .callbacks.metrics import MetricsCallback
from .callbacks.preemption import Preempted, PreemptionCallback
from .callbacks.progress import ProgressCallback
from .callbacks.run_start import StartRun
from .callbacks.validation import PREFIX, ValidationCallback
from .callbacks.watchdog import WatchdogCallback
from .checkpointing.export import export, export_checkpoint
from .checkpointing.folder import BEST, best_checkpoint
from .checkpointing.monitored import Best, Steering, mode_of
from .checkpointing.resume import Place, find_place
from .config import TrainConfig
from .data.loader import worker_lost
from .data.report import SkipReport
from .data.steps import Steps
from .evaluation.tasks import check_task, run_task
from .objectives.families import Objective, objective_of
from .objectives.own_parts import OwnParts
from .objectives.training_step import TrainingModule
from .parallel.host_memory import keep_freed_memory
from .parallel.ranks import from_rank_zero, gathered, in_turns, rank_lost, ranks, say, start_ranks
from .parallel.run_lock import refuse_if_held
from .parallel.sharding import Sharder
from .parallel.stop_requests import StopRequests
from .runs import CHECKPOINTS, METRICS_TABLE, MODEL, SKIPPED_STEPS, write_metrics
from .trainer import accelerator_of, build_trainer


def fit(
    config: TrainConfig,
    *,
    resolved_yaml: str,
    overrides: list[str],
    notes: Sequence[str] = (),
    own: OwnParts | None = None,
) -> Path:
    """Train, export the model, evaluate it where a ``task`` is set; return the run directory.

    Args:
        config: the typed configuration.
        resolved_yaml: the same as text, for ``config.yaml``.
        overrides: what was given on the command line.
        notes: lines for the user, said once everything is known to work.
        own: parts that the user typed by ``_target_``, made already.

    Raises:
        ValueError: something in the configuration cannot work; no run directory is left behind.
        Preempted: a signal asked the run to stop, and it is saved.
    """
    run = prepare(config, resolved_yaml=resolved_yaml, overrides=overrides, notes=notes, own=own)
    # From the directory's making to the last line in it this process is the one that writes there.
    with run.starter.lock, closing(run.trainer.loggers, run.trainer.is_global_zero):
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
    config: TrainConfig,
    *,
    resolved_yaml: str,
    overrides: list[str],
    notes: Sequence[str] = (),
    own: OwnParts | None = None,
) -> PreparedRun:
    """Build loader, model and trainer of a run; arguments and errors as of :func:`fit`."""
    own = own or OwnParts()
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
        module = objective.module(config, fingerprint=loader.fingerprint(), own=own)
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
    preemption = PreemptionCallback(module.stop_requests, config.trainer.seconds())
    watchdog = WatchdogCallback(config.trainer.stuck_timeout)
    steering = steer(config, module, objective, metrics, saver, watchdog)
    starter = StartRun(place, resolved_yaml, overrides, notes)
    # The directory is made first, and a step's row is written before its checkpoint: the table is never behind it.
    callbacks: list[Callback] = [
        starter,
        LoggersCallback(run_dir),
        watchdog,
        *steering,
        metrics,
        saver,
        preemption,
    ]
    if wanted.samples.every_steps and objective.samples is not None:
        callbacks.append(objective.samples(config, run_dir))
    if wanted.progress:
        callbacks.append(ProgressCallback(max_steps=config.trainer.max_steps, global_batch=global_batch))
    callbacks += own.callbacks.values()
    loggers = [*build_loggers(config, run_dir), *own.loggers.values()]
    trainer = build_trainer(config.trainer, callbacks=callbacks, loggers=loggers, root=config.runs_dir)
    return PreparedRun(config, place, loader, module, trainer, starter, metrics, saver, preemption, watchdog)


def steer(
    config: TrainConfig,
    module: TrainingModule,
    objective: Objective,
    metrics: MetricsCallback,
    saver: CheckpointCallback,
    watchdog: WatchdogCallback,
) -> list[Callback]:
    """What validates the run and follows from it; nothing where none of it is asked for.

    Raises:
        ValueError: ``data.val`` cannot be used, or a monitored score is none of those of this run.
    """
    wanted = config.callbacks
    every = wanted.validates_every(config.trainer.max_steps)
    if not every and not wanted.monitors():
        return []
    rank, world_size = ranks()
    validation = objective.validation(config, rank=rank, world_size=world_size) if every else None
    scores = [] if validation is None else [f"{PREFIX}{name}" for name in validation.scores]
    for monitor in wanted.monitors():
        if monitor.startswith(PREFIX) and monitor not in scores:
            raise ValueError(
                f"monitor={monitor} is no score of this run's validation; it has {', '.join(scores)}."
            )
    best, stopping = (
        None if group.monitor is None else Best(group.monitor, mode_of(group.monitor, group.mode))
        for group in (wanted.checkpoint, wanted.early_stopping)
    )
    module.steering = Steering(best, stopping)
    return [
        ValidationCallback(
            validation,
            module.steering,
            every_steps=every or wanted.checkpoint.every_steps or config.trainer.max_steps,
            patience=wanted.early_stopping.patience,
            save_best=wanted.checkpoint.save_best,
            metrics=metrics,
            saver=saver,
            mark=watchdog.mark,
        )
    ]


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
    best = run.module.steering.checkpoint
    if best is not None and best.value is not None and best.step is not None:
        results |= {"best/step": float(best.step), f"best/{best.monitor}": best.value}
    found = best_checkpoint(run_dir / CHECKPOINTS) if run.config.callbacks.checkpoint.export == BEST else None
    if found is None:
        export(run.module, weights, run_dir / MODEL)
    else:
        export_checkpoint(found, run_dir / MODEL)
        say(f"exported the best checkpoint, {found.name}")
    write_metrics(run_dir, results)
    if run.config.task:
        scores = run_task(run.config.task, checkpoint=run_dir / MODEL, data=None, output_dir=run_dir)
        write_metrics(run_dir, scores)
        results |= scores
    log_results(run.config, run.trainer.loggers, run_dir, results, run_dir / MODEL, run.trainer.global_step)
    report = SkipReport()
    for part in lost:
        report.merge(part)
    for line in report.lines() if report.skipped else ():
        say(line)
    if retried:
        say(f"servers of remote shards were asked again {retried} times; nothing was lost by it")
