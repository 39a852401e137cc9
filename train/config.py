"""The schema of `interloom train` and `interloom eval`: dataclasses that Hydra checks every override against.

Each of the groups ``optim trainer callbacks logger`` has its dataclass here; ``model`` and ``data`` have theirs
beside the classes that they configure and are registered by :func:`register_schemas`. YAML files only choose
values; after composition :func:`typed` turns the result into the dataclasses, so the rest of the code never
sees an untyped tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("single", "ddp", "fsdp2")
PROFILERS = ("simple", "advanced", "pytorch")
MODES = ("min", "max")
EXPORTS = ("last", "best")


@dataclass
class OptimConfig:
    """AdamW, its parameter groups and its learning-rate schedule.

    The peak rate is ``lr * global batch / lr_batch_size`` (linear scaling), or ``lr`` itself where
    ``lr_batch_size`` is null. It rises linearly from ``warmup_lr`` over ``warmup_steps`` and falls to
    ``final_lr`` at ``trainer.max_steps``. ``warmup_lr`` and ``final_lr`` scale with the batch as ``lr`` does.

    With ``ema_decay`` (0.999, say) a moving average of the trained weights is kept beside them
    (:class:`~interloom.train.optim.averages.WeightAverage`): it is what the run exports and what its checkpoints stand
    for wherever a model is read from one.
    """

    lr: float = 1e-3
    lr_batch_size: int | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    schedule: str = "cosine"
    warmup_steps: int = 0
    warmup_lr: float = 0.0
    final_lr: float = 0.0
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"optim.ema_decay={self.ema_decay} must lie between 0 and 1, as 0.999 does; null keeps no average."
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule={self.schedule!r} is not known; use one of {', '.join(SCHEDULES)}."
            )
        if self.lr <= 0 or self.warmup_steps < 0:
            raise ValueError(
                f"optim.lr={self.lr} and optim.warmup_steps={self.warmup_steps}: the rate must be above 0 and the "
                "warm-up 0 or more steps."
            )


@dataclass
class TrainerConfig:
    """Where and how long a run trains.

    ``max_steps`` counts optimiser steps. ``micro_batch_size`` is the number of samples that a rank holds
    activations of at once; null means its whole share of the batch. ``compile`` runs the encoders through
    ``torch.compile``. A step whose gradient is not finite changes nothing; ``nonfinite_limit`` of them in a row end
    the run. A rank without progress for ``stuck_timeout`` seconds ends the run
    (:mod:`~interloom.train.parallel.watchdog`).
    After ``max_time``, DD:HH:MM:SS, the run stops as it does when a scheduler asks it to: saved, with exit code 143;
    ``ckpt_path=last`` continues.
    ``overfit_batches`` repeats the first so many batches for ever. With ``trainer=fsdp2`` gradients of
    every micro-batch are reduced to shards at once; ``reduce_every_pass=false`` keeps whole gradients on every rank
    until the last one, for less communication.
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "single"
    precision: str = "32-true"
    max_steps: int = 1000
    micro_batch_size: int | None = None
    compile: bool = False
    deterministic: bool = False
    profiler: str | None = None
    nonfinite_limit: int = 10
    stuck_timeout: float = 600.0
    max_time: str | None = None
    overfit_batches: int = 0
    reduce_every_pass: bool = True

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"trainer.strategy={self.strategy!r} is not known; use {', '.join(STRATEGIES)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.precision!r} is not known; use {', '.join(PRECISIONS)}."
            )
        if self.max_steps < 1 or self.devices < 1 or self.num_nodes < 1 or self.overfit_batches < 0:
            raise ValueError(
                f"trainer.max_steps={self.max_steps}, trainer.devices={self.devices} and "
                f"trainer.num_nodes={self.num_nodes} must be 1 or more, trainer.overfit_batches 0 or more."
            )
        if self.profiler is not None and self.profiler not in PROFILERS:
            raise ValueError(
                f"trainer.profiler={self.profiler!r} is not known; use {', '.join(PROFILERS)}, or null for none."
            )
        self.seconds()
        if self.stuck_timeout <= 0:
            raise ValueError(f"trainer.stuck_timeout={self.stuck_timeout} must be above 0 seconds.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(
                f"trainer.micro_batch_size={self.micro_batch_size} must be 1 or more; null holds the whole batch."
            )

    def seconds(self) -> float | None:
        """``max_time`` in seconds; None without one.

        Raises:
            ValueError: it is not DD:HH:MM:SS, or no time at all.
        """
        if self.max_time is None:
            return None
        parts = str(self.max_time).split(":")
        if len(parts) == 4 and all(part.isascii() and part.isdigit() for part in parts):
            days, hours, minutes, seconds = map(int, parts)
            total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            if total:
                return float(total)
        raise ValueError(f"trainer.max_time={self.max_time!r} is no time; give DD:HH:MM:SS, 00:11:30:00 say.")


@dataclass
class CheckpointConfig:
    """A checkpoint every ``every_steps`` steps (0: only at the end) and the ``keep`` newest of them.

    With ``monitor`` (``val/loss``, say) the checkpoint with the best value of that score is kept too, as ``best``
    beside ``last``, unless ``save_best`` is false. ``mode`` is ``min`` or ``max``; null: ``min`` of a loss, ``max`` of
    any other score. A monitor that begins with ``val/`` turns validation on where
    ``callbacks.validation.every_steps`` is 0. ``export`` says which weights the run exports at its end: ``last`` or
    ``best``.
    """

    every_steps: int = 500
    keep: int = 2
    monitor: str | None = None
    mode: str | None = None
    save_best: bool = True
    export: str = "last"

    def __post_init__(self) -> None:
        _check_mode("callbacks.checkpoint", self.mode)
        if self.export not in EXPORTS:
            raise ValueError(
                f"callbacks.checkpoint.export={self.export!r} is not known; use {' or '.join(EXPORTS)}."
            )
        if self.export == "best" and (self.monitor is None or not self.save_best):
            raise ValueError(
                "callbacks.checkpoint.export=best needs a score to go by; give callbacks.checkpoint.monitor=val/loss, "
                "and leave save_best true."
            )
        if self.every_steps < 0 or self.keep < 2:
            raise ValueError(
                f"callbacks.checkpoint.every_steps={self.every_steps} must be 0 or more and keep={self.keep} at "
                "least 2: the one before the newest is what a damaged file is replaced by."
            )


@dataclass
class SamplesConfig:
    """Every ``every_steps`` (0: never) an IDEFICS continues ``documents`` held-out documents of ``data.val`` with
    ``max_new_tokens``; see :mod:`~interloom.train.callbacks.samples`. Not with ``trainer=fsdp2``.
    """

    every_steps: int = 0
    documents: int = 6
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.documents < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"callbacks.samples has every_steps={self.every_steps}, documents={self.documents} and "
                f"max_new_tokens={self.max_new_tokens}: give 0 or more steps, 1 or more documents and tokens."
            )


@dataclass
class ValidationConfig:
    """Every ``every_steps`` steps (0: never), and after the last, the objective's loss and quick scores on ``data.val``
    go to the columns ``val/…`` of ``metrics.csv``.

    ``limit`` takes the first so many held-out pairs or sequences (null: all), ``scored`` the first so many scenes with
    masks or documents with marked answers (0: none).
    """

    every_steps: int = 0
    limit: int | None = None
    scored: int = 100

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.scored < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"callbacks.validation has every_steps={self.every_steps}, limit={self.limit} and "
                f"scored={self.scored}: give 0 or more steps, a limit of 1 or more (null: none), and 0 or more scored."
            )


@dataclass
class EarlyStoppingConfig:
    """Ends the run, saved and exported, once ``monitor`` (null: never) was not better ``patience`` times in a row.

    ``mode`` as in ``callbacks.checkpoint``. The score is looked at wherever the run validates.
    """

    monitor: str | None = None
    patience: int = 5
    mode: str | None = None

    def __post_init__(self) -> None:
        _check_mode("callbacks.early_stopping", self.mode)
        if self.patience < 1:
            raise ValueError(
                f"callbacks.early_stopping.patience={self.patience} must be 1 or more validations."
            )


def _check_mode(group: str, mode: str | None) -> None:
    if mode not in (None, *MODES):
        raise ValueError(
            f"{group}.mode={mode!r} is not known; use min or max, or null for that of the score."
        )


@dataclass
class CallbacksConfig:
    """What goes on beside the steps: checkpoints, validation, a progress bar, a row of ``metrics.csv`` every
    ``log_every``, samples of what the model writes; ``extra`` maps names to ``_target_`` nodes of your own callbacks.
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    progress: bool = True
    log_every: int = 10
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.log_every < 1:
            raise ValueError(f"callbacks.log_every={self.log_every} must be 1 or more steps.")

    def monitors(self) -> list[str]:
        """The scores that best checkpoints and early stopping go by."""
        return [m for m in (self.checkpoint.monitor, self.early_stopping.monitor) if m is not None]

    def validates_every(self, max_steps: int) -> int:
        """Steps between validations; 0 for none. A monitor of a ``val/…`` score asks for them by itself."""
        if self.validation.every_steps or not any(name.startswith("val/") for name in self.monitors()):
            return self.validation.every_steps
        return self.checkpoint.every_steps or max_steps


@dataclass
class LoggerConfig:
    """``metrics.csv`` is always written; ``wandb``, ``tensorboard``, ``mlflow``, ``trackio`` add records, any at once.

    ``project`` names them. ``offline`` keeps Weights & Biases on this machine; ``tracking_uri`` is MLflow's server
    (null: the folder ``mlruns`` of ``runs_dir``). ``artifacts`` logs the exported model too. ``extra`` maps names to
    ``_target_`` nodes of your own loggers.
    """

    wandb: bool = False
    tensorboard: bool = False
    mlflow: bool = False
    trackio: bool = False
    project: str = "interloom"
    offline: bool = True
    tracking_uri: str | None = None
    artifacts: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """One training run. ``name`` is the folder below ``runs_dir``: the experiment's name unless given. ``objective``
    is a ``_target_`` node of your own LightningModule in place of the family's (docs/extending.md).
    """

    model: Any = None
    data: Any = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    task: Any = None
    objective: Any = None
    seed: int = 0
    name: str | None = None
    runs_dir: str = "runs"
    ckpt_path: str | None = None
    plan_only: bool = False


@dataclass
class EvalConfig:
    """One evaluation: ``interloom eval task=… checkpoint=… data=…`` (``data`` arrives as ``data_path``).

    ``devices`` processes share the samples of the tasks that can be shared.
    """

    task: Any = None
    checkpoint: str | None = None
    data_path: str | None = None
    name: str | None = None
    runs_dir: str = "runs"
    devices: int = 1


def typed(config: DictConfig) -> Any:
    """Turn a composed configuration into its dataclasses, nested ones included; ``task`` stays a plain dict.

    Raises:
        ValueError: a value is missing or out of its range.
    """
    return OmegaConf.to_object(config)


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as nested dicts and lists of plain values, as ``config.yaml`` holds it."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
