"""Loggers beside ``metrics.csv``, the record of truth: Weights & Biases, TensorBoard, MLflow and Trackio, any at once.

Each gets the whole configuration and environment, every row of the table, pictures and texts, and, if asked, the model
that is exported. Rank 0 alone writes. A run that is gone on with goes on in its own record, at its own step. A logger
that fails is left out for the rest of the run, with one line: training does not end for it.
"""

from __future__ import annotations

import contextlib
import io
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from ..config import TrainConfig
from ..messages import tell
from ..runs import CONFIG, ENVIRONMENT

Values = Mapping[str, float]


class Tracker(Logger):
    """What a backend must do; made on every rank, opened on rank 0 once the run directory is there.

    Args:
        config: of the run.
        run_dir: its directory, whose name is that of the record.
    """

    package = ""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        super().__init__()
        self.config, self.run_dir = config, run_dir
        self.failed = False

    @property
    def name(self) -> str:
        return f"{self.config.name}/{self.run_dir.name}"

    @property
    def version(self) -> str:
        return self.run_dir.name

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: :meth:`open` has the whole configuration."""

    @abstractmethod
    def open(self, step: int, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Begin the record, or go on with it after ``step`` optimiser steps."""

    @abstractmethod
    def log_metrics(self, metrics: Values, step: int | None = None) -> None: ...

    @abstractmethod
    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        """Picture files under one name."""

    @abstractmethod
    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        """A table of texts."""

    @abstractmethod
    def log_model(self, folder: Path) -> None:
        """The exported model as an artifact."""

    @abstractmethod
    def close(self) -> None: ...


class WandbTracker(Tracker):
    """Weights & Biases; offline records lie in ``runs/wandb``, and `wandb sync` sends them."""

    package = "wandb"
    run: Any

    def open(self, step: int, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=self.config.logger.project,
            name=self.name,
            id=self.version,
            dir=self.config.runs_dir,
            mode="offline" if self.config.logger.offline else "online",
            resume="allow",
            config={**settings, "environment": environment},
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log_metrics(self, metrics: Values, step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        import wandb

        self.run.log({key: [wandb.Image(path) for path in images]}, step=step)

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        import wandb

        self.run.log({key: wandb.Table(columns=list[Any](columns), data=list[Any](data))}, step=step)

    def log_model(self, folder: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.config.name}-{self.version}", type="model")
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()


class TensorBoardTracker(Tracker):
    """TensorBoard, in ``tensorboard/`` of the run directory: `tensorboard --logdir runs` shows all runs."""

    package = "tensorboard"
    writer: Any

    def open(self, step: int, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged of steps that are about to be done again does not show.
        self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        for name, values in (("config", settings), ("environment", environment)):
            text = "\n".join(f"    {line}" for line in yaml.safe_dump(values).splitlines())
            self.writer.add_text(name, text, step)

    def log_metrics(self, metrics: Values, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        import numpy as np

        from ...models.pictures import load_rgb

        for number, path in enumerate(images):
            name = key if len(images) == 1 else f"{key}/{number}"
            self.writer.add_image(name, np.asarray(load_rgb(path)), step, dataformats="HWC")

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        rows = [columns, ["---"] * len(columns), *data]
        lines = [
            "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"
            for row in rows
        ]
        self.writer.add_text(key, "\n".join(lines), step)

    def log_model(self, folder: Path) -> None:
        """Nothing: the record lies beside the model."""

    def close(self) -> None:
        self.writer.close()


class MLflowTracker(Tracker):
    """MLflow: the server of ``logger.tracking_uri``, else a folder ``runs/mlruns``."""

    package = "mlflow"
    client: Any
    run_id: str

    def open(self, step: int, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        import os

        uri = self.config.logger.tracking_uri
        if uri is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (Path(self.config.runs_dir).resolve() / "mlruns").as_uri()
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(uri)
        project = self.config.logger.project
        experiment = self.client.get_experiment_by_name(project)
        number = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        known = self.client.search_runs([number], f"tags.`interloom.run` = '{self.version}'", max_results=1)
        if known:
            self.run_id = known[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return
        run = self.client.create_run(number, run_name=self.name, tags={"interloom.run": self.version})
        self.run_id = run.info.run_id
        for name, value in flat({**settings, "environment": environment}).items():
            self.client.log_param(self.run_id, name, str(value)[:500])

    def log_metrics(self, metrics: Values, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        for path in images:
            self.client.log_artifact(self.run_id, path, f"pictures/{key}/step-{step:08d}")

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        lines = "".join(
            json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in data
        )
        self.client.log_text(self.run_id, lines, f"{key}/step-{step:08d}.jsonl")

    def log_model(self, folder: Path) -> None:
        self.client.log_artifacts(self.run_id, str(folder), "model")

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


class TrackioTracker(Tracker):
    """Trackio, a local record that `trackio show` draws."""

    package = "trackio"
    run: Any

    def open(self, step: int, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # its greetings
            self.run = trackio.init(
                project=self.config.logger.project,
                name=self.name,
                resume="allow",
                config=flat({**settings, "environment": environment}),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log_metrics(self, metrics: Values, step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    def log_image(self, key: str, images: Sequence[str], step: int) -> None:
        import trackio

        self.run.log({key: trackio.Image(images[0])}, step=step)

    def log_text(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        import pandas
        import trackio

        self.run.log({key: trackio.Table(dataframe=pandas.DataFrame(data, columns=columns))}, step=step)

    def log_model(self, folder: Path) -> None:
        """Nothing: it has no artifacts."""

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "trackio": TrackioTracker,
}


def build_loggers(config: TrainConfig, run_dir: Path) -> list[Tracker]:
    """The loggers that the config asks for.

    Raises:
        ValueError: one is asked for whose package is not installed.
    """
    chosen = [name for name in TRACKERS if getattr(config.logger, name)]
    for name in chosen:
        try:
            import_module(TRACKERS[name].package)
        except ImportError as error:
            raise ValueError(
                f"logger.{name}=true needs the package {name}; install interloom[{name}], or leave it out."
            ) from error
    return [TRACKERS[name](config, run_dir) for name in chosen]


def guarded(trackers: Sequence[Any], call: Callable[[Any], None]) -> None:
    """Call each logger that still works; one that fails is left out from now on."""
    for tracker in trackers:
        if getattr(tracker, "failed", False):
            continue
        try:
            call(tracker)
        except Exception as error:  # whatever a service or its client raises
            tracker.failed = True
            said = " ".join(str(error).split())[:200] or type(error).__name__
            tell(
                f"WARNING: {type(tracker).__name__} failed and is left out ({said}); metrics.csv has everything."
            )


class LoggersCallback(Callback):
    """Opens the loggers once the run directory is there. It must come after the callback that makes it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or not trainer.loggers:
            return
        settings = yaml.safe_load((self.run_dir / CONFIG).read_text(encoding="utf-8"))
        environment = json.loads((self.run_dir / ENVIRONMENT).read_text(encoding="utf-8"))
        trackers = [logger for logger in trainer.loggers if isinstance(logger, Tracker)]
        guarded(trackers, lambda tracker: tracker.open(trainer.global_step, settings, environment))


@contextmanager
def closing(loggers: Sequence[Any], first: bool) -> Iterator[None]:
    """Close what was opened, however the block ends."""
    try:
        yield
    finally:
        if first:
            guarded(
                [logger for logger in loggers if isinstance(logger, Tracker)], lambda tracker: tracker.close()
            )


def log_results(
    config: TrainConfig, loggers: Sequence[Any], run_dir: Path, scores: Values, model: Path, step: int
) -> None:
    """Give the loggers what a run ends with: its scores, the pictures in its directory, the model if asked."""

    def log(tracker: Any) -> None:
        tracker.log_metrics(scores, step=step)
        if isinstance(tracker, Tracker):
            for path in sorted(run_dir.glob("*.png")):
                tracker.log_image(path.stem, [str(path)], step)
            if config.logger.artifacts:
                tracker.log_model(model)

    guarded(loggers, log)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted names."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }
