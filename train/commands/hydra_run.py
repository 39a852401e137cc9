"""`interloom train` and `interloom eval`: Hydra composes, the typed configuration runs.

Hydra prints several lines and exits with 1 for a misspelt override. Here its errors come back as exceptions,
become one sentence with the nearest names, and exit with 2 like every other user error.
"""

from __future__ import annotations

import os
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

from ..messages import without_secrets
from ..parallel.launch import check_launcher, in_submitit_job
from .cluster import fitted
from .hydra_errors import explain, unknown_setting
from .mapping_overrides import allow_new_names, drop_replaced_names
from .override_quoting import quote_paths, quote_words
from .own_experiments import check_encoding, config_folders, folder_of
from .schemas import register_schemas

CONFIG_PATH = "pkg://interloom.conf"


def run(arguments: list[str], config_name: str, task: Callable[[DictConfig], int]) -> int:
    """Let Hydra compose ``config_name`` with the arguments and call ``task``, once or for a whole sweep.

    Raises:
        ValueError: the configuration or what it leads to cannot work.
    """
    _check_flags(arguments, config_name)
    check_launcher(arguments)
    check_encoding(arguments)
    for folder in config_folders(arguments):
        folder_of(folder)
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
