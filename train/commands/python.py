"""The way in from Python: what `interloom train`, `eval` and `segment` do, as functions that return their results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict

from ..config import TrainConfig, plain, typed
from ..messages import tell

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data.loader import PlanLoader

    Picture = str | os.PathLike[str] | np.ndarray | Any


def compose_config(overrides: Sequence[str] = (), *, config_dir: str | Path | None = None) -> DictConfig:
    """The configuration of a training run, as `interloom train` composes it.

    Args:
        overrides: what would stand on the command line: ``["experiment=groupvit_demo", "trainer.max_steps=10"]``.
        config_dir: folder with groups and experiments of your own, as ``--config-dir``.

    Returns:
        The whole configuration; its values may be changed, ``config.trainer.max_steps = 20``, and are checked.

    Raises:
        ValueError: an override names no setting, or a value that is not possible; one sentence, with the nearest names.
    """
    from .adoption import adopt

    if isinstance(overrides, str):
        raise ValueError(f"overrides={overrides!r} is one string; give a list of them, [{overrides!r}].")
    given = list(overrides)
    config, choices, given = _composed("train", given, config_dir)
    if config.name is None:
        config.name = choices.get("experiment") or config.model.get("family", "train")
    for note in adopt(config, given):
        tell(note)
    return config


def fit(config: DictConfig | TrainConfig | Sequence[str], *, progress: bool = False) -> Path:
    """Train, export the model, and score it where a ``task`` is set.

    Args:
        config: of :func:`compose_config`, or its overrides.
        progress: show a progress bar (or lines), if ``callbacks.progress`` does not say otherwise.

    Returns:
        The run's directory: ``metrics.csv``, ``metrics.json``, ``checkpoints/``, ``model/`` and what the task drew.

    Raises:
        ValueError, FileNotFoundError: the configuration cannot work; no directory is left behind.
        interloom.train.callbacks.preemption.Preempted: interrupted, and saved; ``ckpt_path=last`` continues.
    """
    from ..fitting import fit as run
    from .own_parts import make_own_parts

    settings, text = _settings(config)
    settings.callbacks.progress &= progress
    return run(settings, resolved_yaml=text, overrides=[], own=make_own_parts(settings))


def load(
    checkpoint: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """The model and its processor, in evaluation mode.

    Args:
        checkpoint: a run directory, ``RUN/best`` or ``RUN/last``, a ``.ckpt``, a ``save_pretrained`` folder, a folder
            of adapters, or a hub id (``owner/name``).
        device: where the weights go.
        dtype: of the weights; None keeps the file's.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is no checkpoint.
    """
    from ..checkpointing.load import load_pretrained

    return load_pretrained(checkpoint, device=device, dtype=dtype)


def build_loader(
    config: DictConfig | TrainConfig | Sequence[str],
    *,
    split: str = "train",
    rank: int = 0,
    world_size: int = 1,
) -> PlanLoader:
    """The batches that a run reads, in its order: an iterable with a length.

    Args:
        config: of :func:`compose_config`, or its overrides.
        split: ``train``, the batches of all ``trainer.max_steps`` steps; or ``val``, each held-out sample once.
        rank, world_size: the share of one of several processes.

    Returns:
        Batches as ``interloom.train.data.pairs.dataset`` and ``interloom.train.data.documents.dataset`` describe them,
        before augmentation and normalisation.

    Raises:
        ValueError, FileNotFoundError: there is no such data, or it does not fit the run.
    """
    from ..data.documents.dataset import DocumentsConfig, documents_loader
    from ..data.pairs.dataset import pairs_loader
    from ..objectives.families import objective_of

    settings, _ = _settings(config)
    if split == "train":
        return objective_of(settings).loader(settings, rank=rank, world_size=world_size)
    share: dict[str, Any] = {"seed": settings.seed, "rank": rank, "world_size": world_size, "split": split}
    if isinstance(settings.data, DocumentsConfig):
        return documents_loader(settings.data, **share)
    return pairs_loader(settings.data, **share)


def evaluate(
    checkpoint: str | Path,
    task: str,
    *,
    data: str | Path | None = None,
    output_dir: str | Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Score a checkpoint, as `interloom eval` does, in this process.

    Args:
        checkpoint: as in :func:`load`.
        task: ``segmentation``, ``retrieval``, ``classification``, ``perplexity``, ``vqa``, ``caption``, …
        data: what the task reads.
        output_dir: where pictures go; None keeps none.
        options: of the task, ``limit=100``; ``docs/evaluation.md`` lists them.

    Returns:
        Scores by name, ``segmentation/miou`` for instance.

    Raises:
        ValueError, FileNotFoundError: no such task or option, or checkpoint and data do not fit.
    """
    from ..evaluation.tasks import run_task

    config, *_ = _composed("eval", [f"task={task}"], None)
    chosen: dict[str, Any] = plain(config)["task"]
    if unknown := sorted(set(options) - set(chosen)):
        known = ", ".join(name for name in chosen if not name.startswith("_"))
        raise ValueError(f"task={task} has no option {unknown[0]!r}; it has {known}.")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = Path(nowhere if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return run_task(
            {**chosen, **options},
            checkpoint=str(checkpoint),
            data=None if data is None else str(data),
            output_dir=folder,
        )


@dataclass(frozen=True)
class Segmentation:
    """Segments of one picture.

    Attributes:
        image: RGB uint8 [H, W, 3].
        labels: the names that were looked for.
        mask: int64 [H, W]: 0 is background, ``k`` stands for ``labels[k - 1]``.
        scores: the highest score of each label, 0 to 1.
    """

    image: np.ndarray
    labels: list[str]
    mask: np.ndarray
    scores: dict[str, float]

    def shares(self) -> dict[str, float]:
        """The share of the picture that each label found covers, largest first."""
        found = {name: float((self.mask == place + 1).mean()) for place, name in enumerate(self.labels)}
        return dict(sorted(((n, s) for n, s in found.items() if s), key=lambda item: -item[1]))

    def save(self, path: str | Path, *, opacity: float = 0.55) -> Path:
        """Draw the segments over the picture, with a legend, into a PNG or JPEG file."""
        from ..evaluation.pictures.overlay import draw_overlay
        from .segment import check_output

        check_output(Path(path))
        draw_overlay(self.image, self.mask, self.labels, Path(path), opacity=opacity)
        return Path(path)


def segment(
    image: Picture,
    labels: Sequence[str] | str,
    *,
    checkpoint: str | Path | tuple[Any, Any] = "runs/groupvit_demo/latest",
    background: Sequence[str] | str = (),
    threshold: float | None = 0.95,
    size: int | None = None,
    template: str = "a photo of a {}.",
) -> Segmentation:
    """Zero-shot segmentation of one picture by the published protocol.

    Args:
        image: a file, a Pillow image, or RGB uint8 [H, W, 3].
        labels: names to look for; a string is read as on the command line, ``"cat,dog"`` or ``"voc"``.
        checkpoint: as in :func:`load`, of a GroupViT; or what :func:`load` returned, to load it but once.
        background: names that compete with the labels and count as background.
        threshold: score below which a pixel is background; None names every pixel.
        size: short side in pixels; None: 448 for models of 224 pixels, else the model's own.
        template: prompt around a name.

    Raises:
        FileNotFoundError, ValueError: no such picture or checkpoint, or the tokenizer knows no word of a name.
    """
    from ..evaluation.groupvit.labels import split_labels
    from .segment import segment_pixels

    names, others = (
        split_labels(given) if isinstance(given, str) and given else list(given)
        for given in (labels, background)
    )
    if not names:
        raise ValueError("labels is empty; give the names to look for, ['cat', 'dog'].")
    others = [name for name in others if name not in names]
    pixels = _pixels(image)
    source = checkpoint if isinstance(checkpoint, tuple) else str(checkpoint)
    mask, best = segment_pixels(
        pixels, names + others, source, threshold=threshold or None, size=size, template=template
    )
    mask[mask > len(names)] = 0
    return Segmentation(pixels, names, mask, dict(zip(names, best, strict=False)))


def _pixels(image: Picture) -> np.ndarray:
    """RGB uint8 [H, W, 3] of whatever stands for a picture."""
    from ...models.pictures import to_rgb
    from .segment import read_image

    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if not isinstance(image, np.ndarray):
        return np.asarray(to_rgb(image, "image"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image has shape {list(image.shape)} of {image.dtype}; give RGB uint8 [H, W, 3] or a file."
        )
    return image


def _composed(
    name: str, given: list[str], config_dir: str | Path | None
) -> tuple[DictConfig, Mapping[str, Any], list[str]]:
    """The configuration, what was chosen of each group, and the overrides as Hydra took them."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from .hydra_errors import explain, unknown_setting
    from .mapping_overrides import allow_new_names, drop_replaced_names
    from .override_quoting import quote_paths, quote_words
    from .own_experiments import check_encoding, folder_of
    from .schemas import register_schemas

    flags: list[str] = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise FileNotFoundError(
                f"config_dir={config_dir} does not exist; give a folder of configurations."
            )
        flags = ["--config-dir", str(config_dir)]
        folder_of(config_dir)
    check_encoding([*flags, *given])
    given = allow_new_names(quote_words(quote_paths(given)))
    search = [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]
    register_schemas()
    try:
        with _own_hydra(), initialize_config_module("interloom.conf", version_base="1.3"):
            whole = compose(name, overrides=[*given, *search], return_hydra_config=True)
        choices = dict(whole.hydra.runtime.choices)
        with open_dict(whole):
            del whole["hydra"]
        drop_replaced_names(whole, given)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(explain(error, [*flags, *given], name)) from error
    if problem := unknown_setting(whole, name, [*flags, *given]):
        raise ValueError(problem)
    return whole, choices, given


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra's state is one for a process: that of the caller's program is put aside and back."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    before = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(before)


def _settings(config: DictConfig | TrainConfig | Sequence[str]) -> tuple[TrainConfig, str]:
    """The typed configuration, and the same as text."""
    if not isinstance(config, DictConfig | TrainConfig):
        config = compose_config(config)
    if isinstance(config, DictConfig):
        settings, tree = typed(config), config
        if not isinstance(settings, TrainConfig):
            raise ValueError("config is not the configuration of a run; give what compose_config returns.")
    else:
        settings = config
        if settings.name is None:
            settings.name = getattr(settings.model, "family", "train")
        tree = OmegaConf.create(
            {item.name: _tree(getattr(settings, item.name)) for item in fields_of(settings)}
        )
    return settings, OmegaConf.to_yaml(OmegaConf.create(plain(tree)))


def _tree(value: Any) -> Any:
    """A typed group as something OmegaConf takes."""
    return OmegaConf.structured(value) if hasattr(value, "__dataclass_fields__") else value
