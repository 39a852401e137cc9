"""``interloom train``."""

from __future__ import annotations

import os
import shlex
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..config import TrainConfig, plain, typed
from ..messages import tell
from ..parallel.launch import adopt_launcher, become_torchrun, in_submitit_job, leave_submitit_job
from ..runs import show_scores
from .adoption import adopt
from .hydra_run import run


def train(arguments: list[str]) -> int:
    """``interloom train experiment=… [overrides]``."""
    return run(arguments, "train", _train)


def _train(config: DictConfig) -> int:
    choice = HydraConfig.get().runtime.choices.get("experiment")
    if config.name is None:
        config.name = choice or config.model.get("family", "train")
    notes = adopt(config, HydraConfig.get().overrides.task)
    settings = typed(config)
    assert isinstance(settings, TrainConfig)
    _refuse_parallel_sweep(settings, sys.argv[1:])
    if settings.plan_only:
        from .plan import print_plan

        for note in notes:
            tell(note)
        print_plan(settings)
        return 0
    _launch_ranks(settings, sys.argv[1:])
    from ..callbacks.preemption import Preempted
    from ..fitting import fit
    from ..parallel.ranks import ranks, say
    from .own_parts import make_own_parts

    resolved = OmegaConf.to_yaml(OmegaConf.create(plain(config)))
    try:
        overrides = list(HydraConfig.get().overrides.task)
        run_dir = fit(
            settings, resolved_yaml=resolved, overrides=overrides, notes=notes, own=make_own_parts(settings)
        )
    except Preempted as stop:
        say(f"{stop}:\n  {_resume_command(sys.argv[1:])}")
        if in_submitit_job():
            leave_submitit_job(requeue=stop.requeue)
        return stop.exit_code
    if ranks()[0] == 0:
        show_scores(run_dir)
    return 0


def _resume_command(arguments: list[str]) -> str:
    """The command that goes on where this run stopped."""
    kept = [argument for argument in arguments if not argument.startswith("ckpt_path=")]
    return shlex.join(["interloom", "train", *kept, "ckpt_path=last"])


def _refuse_parallel_sweep(settings: TrainConfig, arguments: list[str]) -> None:
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    launcher = str(HydraConfig.get().launcher.get("_target_", ""))
    if not sweeping or settings.trainer.devices * settings.trainer.num_nodes == 1 or "submitit" in launcher:
        return
    given = " ".join(a for a in arguments if a not in {"-m", "--multirun"})
    raise ValueError(
        "a sweep (-m) inside one process cannot use several devices; have every setting run as a job of its own: "
        f"interloom train -m hydra/launcher=submitit_slurm {given} (submitit_local without a cluster), or give "
        f"each setting a command: interloom train {given} with single values."
    )


def _launch_ranks(settings: TrainConfig, arguments: list[str]) -> None:
    """Start again under torchrun where several devices of this machine are asked for and no launcher ran.

    Arguments are those Hydra was given, so the processes compose the same configuration.
    """
    trainer = settings.trainer
    if trainer.devices * trainer.num_nodes == 1 or adopt_launcher() > 1 or "WORLD_SIZE" in os.environ:
        return
    from ..trainer import accelerator_of, strategy_of

    strategy_of(trainer)
    accelerator_of(trainer)
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} needs a launcher on every machine: torchrun "
            f"--nnodes={trainer.num_nodes} --nproc_per_node={trainer.devices} … -m interloom.train …, or srun."
        )
    become_torchrun(trainer.devices, arguments)
