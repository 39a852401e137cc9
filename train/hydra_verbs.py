"""`interloom train` and `interloom eval`: Hydra composes, the typed configuration runs.

Hydra prints several lines and exits with 1 for a misspelt override. Here its errors come back as exceptions,
become one sentence with the nearest names, and exit with 2 like every other user error.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .adoption import adopt
from .cluster import fitted
from .config import EvalConfig, TrainConfig, plain, register_schemas, typed
from .hydra_errors import explain, unknown_setting
from .launch import adopt_launcher, become_torchrun, check_launcher, in_submitit_job, leave_submitit_job
from .mapping_overrides import allow_new_names, drop_replaced_names
from .messages import show, tell, without_secrets
from .override_quoting import quote_paths, quote_words
from .own_experiments import check_encoding

CONFIG_PATH = "pkg://interloom.conf"


def train(arguments: list[str]) -> int:
    """``interloom train experiment=… [overrides]``."""
    return run(arguments, "train", _train)


def evaluate(arguments: list[str]) -> int:
    """``interloom eval task=… checkpoint=… data=…``.

    ``data`` is a group of configurations for `train`; here it is a path, so it is passed on as ``data_path``.
    """
    renamed = ["data_path=" + a.removeprefix("data=") if a.startswith("data=") else a for a in arguments]
    return run(renamed, "eval", _evaluate)


def run(arguments: list[str], config_name: str, task: Callable[[DictConfig], int]) -> int:
    """Let Hydra compose ``config_name`` with the arguments and call ``task``, once or for a whole sweep.

    Raises:
        ValueError: the configuration or what it leads to cannot work.
    """
    _check_flags(arguments, config_name)
    check_launcher(arguments)
    check_encoding(arguments)
    arguments = fitted(arguments)
    arguments = allow_new_names(quote_words(quote_paths(arguments)))
    # conf/hydra/launcher/submitit_….yaml are meant to be checked against the plugin's fields of that name.
    warnings.filterwarnings(
        "ignore", message="(?s).*is validated against ConfigStore schema with the same name"
    )
    register_schemas()
    codes: list[int] = []
    failures: list[BaseException] = []
    sweeps: set[Path] = set()

    def job(config: DictConfig) -> None:
        # Hydra would print the failed overrides and wrap the error: it is kept and raised again below.
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweeps.add(Path(HydraConfig.get().sweep.dir))
        if failures:
            return
        try:
            drop_replaced_names(config, HydraConfig.get().overrides.task)
            if problem := unknown_setting(config, config_name, arguments):
                raise ValueError(problem)
            codes.append(task(config))
        except BaseException as failure:
            if in_submitit_job():  # another process than the one that waits below
                raise
            failures.append(failure)

    main = hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=config_name)(job)
    try:
        with _environment(arguments, config_name):
            main()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        _raise_explained(error, arguments, config_name)
    except Exception as error:
        if type(error).__name__ != "FailedJobError":  # submitit's, which need not be installed
            raise
        raise ValueError(f"SLURM does not take the sweep: {' '.join(str(error).split())}") from error
    except SystemExit as stop:  # after --help
        if stop.code not in (0, None):
            raise
    if failures:
        failure = failures[0]
        if not codes:
            for folder in sweeps:
                _forget_sweep(folder)
        if isinstance(failure, OmegaConfBaseException):
            _raise_explained(failure, arguments, config_name)
        raise failure
    return max(codes, default=0)


def _forget_sweep(folder: Path) -> None:
    """Remove what Hydra made for a sweep of which nothing ran: its ``multirun.yaml`` and the folders around it."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    for empty in (folder, folder.parent, folder.parent.parent):
        if not empty.is_dir() or any(empty.iterdir()):
            break
        empty.rmdir()


def _check_flags(arguments: list[str], config_name: str) -> None:
    """Argparse would answer a wrong flag with a page of usage."""

    def refuse(message: str) -> None:
        raise ValueError(f"{message}; see `interloom {config_name} --help`.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign,assignment]
    parser.parse_args(arguments)


def _raise_explained(error: Exception, arguments: list[str], config_name: str) -> None:
    if os.environ.get("INTERLOOM_TRACEBACK", "0") not in {"", "0"}:
        raise error
    raise ValueError(explain(error, arguments, config_name)) from error


def _save_without_secrets(config: Any, f: Any, resolve: bool = False) -> None:
    text = without_secrets(OmegaConf.to_yaml(config, resolve=resolve))
    if hasattr(f, "write"):
        f.write(text)
    else:
        Path(f).write_text(text, encoding="utf-8")


@contextmanager
def _environment(arguments: list[str], config_name: str) -> Iterator[None]:
    """Hydra reads ``sys.argv``, and raises instead of exiting where ``HYDRA_FULL_ERROR`` is set.

    Its sweeper stores the configuration with all overrides, ``multirun.yaml``: without secrets, as a run's own.
    """
    before, full, save = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), OmegaConf.save
    sys.argv = [f"interloom {config_name}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    OmegaConf.save = staticmethod(_save_without_secrets)  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.argv, OmegaConf.save = before, staticmethod(save)  # type: ignore[method-assign]
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _train(config: DictConfig) -> int:
    choice = HydraConfig.get().runtime.choices.get("experiment")
    if config.name is None:
        config.name = choice or config.model.get("family", "train")
    notes = adopt(config, HydraConfig.get().overrides.task)
    settings = typed(config)
    assert isinstance(settings, TrainConfig)
    _refuse_parallel_sweep(settings, sys.argv[1:])
    if settings.plan_only:
        from .memory_plan import print_plan

        for note in notes:
            tell(note)
        print_plan(settings)
        return 0
    _launch_ranks(settings, sys.argv[1:])
    from .callbacks.preemption import Preempted
    from .distributed import ranks, say
    from .fit import fit

    resolved = OmegaConf.to_yaml(OmegaConf.create(plain(config)))
    try:
        overrides = list(HydraConfig.get().overrides.task)
        run_dir = fit(settings, resolved_yaml=resolved, overrides=overrides, notes=notes)
    except Preempted as stop:
        say(f"{stop}:\n  {_resume_command(sys.argv[1:])}")
        if in_submitit_job():
            leave_submitit_job(requeue=stop.requeue)
        return stop.exit_code
    if ranks()[0] == 0:
        _report(run_dir)
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
    from .trainer import accelerator_of, strategy_of

    strategy_of(trainer)
    accelerator_of(trainer)
    if trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} needs a launcher on every machine: torchrun "
            f"--nnodes={trainer.num_nodes} --nproc_per_node={trainer.devices} … -m interloom.train …, or srun."
        )
    become_torchrun(trainer.devices, arguments)


def _evaluate(config: DictConfig) -> int:
    settings = typed(config)
    assert isinstance(settings, EvalConfig)
    from .evaluation.ranks import check_count, rank_and_count, ranks_of
    from .evaluation.tasks import check_task, run_task

    task = check_task(settings.task)
    if settings.checkpoint is None:
        raise ValueError(
            "checkpoint is not set; give checkpoint=RUN_DIR, a .ckpt or a save_pretrained folder."
        )
    from .checkpoints import model_type
    from .files import write_atomically
    from .runs import (
        CONFIG,
        create_run,
        new_run_id,
        point_latest,
        write_environment,
        write_metrics,
    )

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
    _report(run_dir)
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


def _report(run_dir: Path) -> None:
    """Print the scores of a run as a small table and say where they are."""
    from .runs import read_metrics

    metrics: dict[str, Any] = read_metrics(run_dir)
    width = max((len(name) for name in metrics), default=0)
    for name, value in metrics.items():
        shown = "–" if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
        show(f"  {name:<{width}}  {shown:>10}")
    show(f"run directory: {run_dir}")
