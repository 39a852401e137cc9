"""Lightning's Trainer, set up so that a step is all the state a run has."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from .checkpointing.folder import AtomicCheckpointIO
from .config import TrainerConfig
from .messages import tell
from .objectives.training_step import TrainingModule
from .strategies import AveragingStrategy, ShardedStrategy


def accelerator_of(config: TrainerConfig) -> str:
    """``cpu`` or ``cuda``; what ``auto`` stands for on this machine.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    found = torch.cuda.is_available()
    if config.accelerator == "auto":
        return "cuda" if found else "cpu"
    if config.accelerator in {"gpu", "cuda"}:
        if not found:
            raise ValueError(
                f"trainer.accelerator={config.accelerator} but PyTorch finds no GPU here; use trainer=cpu or install "
                "the driver."
            )
        return "cuda"
    if config.accelerator != "cpu":
        raise ValueError(f"trainer.accelerator={config.accelerator!r} is not known; use auto, cpu or gpu.")
    return "cpu"


def warn_of_slow_precision(config: TrainerConfig, accelerator: str) -> None:
    """Warn once where bfloat16 is asked of a processor that has no instructions for it."""
    if accelerator != "cpu" or not config.precision.startswith("bf16") or has_bfloat16_instructions():
        return
    message = (
        f"trainer.precision={config.precision} on a CPU without bfloat16 instructions: products are some 20 times "
        "slower than in float32; use trainer.precision=32-true here."
    )
    warnings.warn(message, stacklevel=2)


@cache
def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16; yes too where the system does not tell."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    flags = set(cpu.replace(":", " ").split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16", "svebf16"})


def build_trainer(
    config: TrainerConfig, *, callbacks: Sequence[Callback], loggers: Sequence[Any], root: str
) -> Trainer:
    """A Trainer of one endless epoch of ``max_steps`` steps, without validation inside it.

    Lightning's own progress bar, checkpoints, logging and sanity checks are off: callbacks of ours do those.
    """
    for package in ("pytorch", "fabric"):  # its greetings; warnings still come through
        logging.getLogger(f"lightning.{package}.utilities.rank_zero").setLevel(logging.WARNING)
    # Lightning warns of what is intended here: the position in the data is global_step, the loader keeps none.
    warnings.filterwarnings(
        "ignore", message="(?s).*`srun` command is available.*"
    )  # one process is what was asked for
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")  # a login node
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
    warnings.filterwarnings("ignore", message=".*Found .* module.* in eval mode.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    accelerator = accelerator_of(config)
    warn_of_slow_precision(config, accelerator)
    scaled = [ScaledPrecision(accelerator)] if config.precision == "16-mixed" else []
    trainer = Trainer(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy_of(config),
        precision=None if scaled else config.precision,  # type: ignore[arg-type]
        max_steps=config.max_steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        plugins=[AtomicCheckpointIO(), cluster_environment(config), *scaled],
        default_root_dir=root,
        deterministic=config.deterministic,
        profiler=config.profiler,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        barebones=False,
    )
    leave_signals_alone(trainer)
    return trainer


def leave_signals_alone(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: ours do.

    Its SIGTERM handler broadcasts from rank 0, wherever that rank is, and every step begins with a broadcast of
    what the handler of rank 0 saw.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    epoch_loop._broadcast_sigterm_tensor = lambda: None


def cluster_environment(config: TrainerConfig) -> ClusterEnvironment:
    """Whoever launched, ranks have torchrun's variables; Lightning's own guesses would requeue SLURM jobs unsaved."""
    several = config.devices * config.num_nodes > 1
    return TorchElasticEnvironment() if several else LightningEnvironment()


def strategy_of(config: TrainerConfig) -> Any:
    """The Lightning strategy that a config names."""
    if config.devices * config.num_nodes > 1 and config.strategy == "single":
        raise ValueError(
            f"trainer.devices={config.devices} needs trainer=ddp or trainer=fsdp2; trainer.strategy is 'single'."
        )
    if config.devices * config.num_nodes == 1:
        if config.strategy != "single":
            tell(
                f"note: trainer.strategy={config.strategy} given for one device: there is nothing to share; "
                "give trainer.devices=N for several."
            )
        return "auto"
    if config.strategy == "fsdp2":
        if config.precision == "16-mixed":
            raise ValueError(
                "trainer=fsdp2 cannot scale losses for trainer.precision=16-mixed; use bf16-mixed, or trainer=ddp."
            )
        if config.compile:
            raise ValueError(
                "trainer.compile=true does not go with trainer=fsdp2; leave it out, or use trainer=ddp."
            )
        return ShardedStrategy(config.precision)
    return AveragingStrategy()


class ScaledPrecision(MixedPrecision):
    """Lightning's ``16-mixed``, without its unscaling.

    Finite values are agreed on and gradients clipped before the optimiser's step, so the gradients are unscaled by
    then; Lightning would do it again and PyTorch refuses that. The scale itself is in the checkpoint, as Lightning
    writes it.
    """

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        assert isinstance(model, TrainingModule)
        assert self.scaler is not None
        closure()
        self._after_closure(model, optimizer)
        if not model.unscaled:  # a step without any gradient
            return None
        output = self.scaler.step(optimizer, **kwargs)  # does nothing where a gradient was not finite
        self.scaler.update()
        return output
