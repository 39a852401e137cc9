"""Which family a run trains: the one place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback

from ..callbacks.validation import Validation
from ..config import TrainConfig
from ..data.plugins import FAMILIES, load_plugin
from .training_step import TrainingModule


@dataclass(frozen=True)
class Objective:
    """What a model family brings to a run: its module, its loader, its validation and samples of its output."""

    module: Callable[..., TrainingModule]
    loader: Callable[..., Any]
    validation: Callable[..., Validation]
    samples: Callable[..., Callback] | None = None


def objective_of(config: TrainConfig) -> Objective:
    """The objective of ``model.family``, imported only now."""
    family = (
        config.model.get("family")
        if isinstance(config.model, dict)
        else getattr(config.model, "family", None)
    )
    if family == "groupvit":
        from .groupvit.build import build_loader, build_module
        from .groupvit.validation import PairsValidation

        return Objective(build_module, build_loader, PairsValidation)
    if family == "idefics":
        from .idefics.build import build_loader, build_module, build_samples
        from .idefics.validation import DocumentsValidation

        return Objective(build_module, build_loader, DocumentsValidation, build_samples)
    if (plugin := load_plugin(FAMILIES, str(family))) is not None:
        found = plugin if isinstance(plugin, Objective) else plugin()
        if not isinstance(found, Objective):
            raise ValueError(
                f"the entry point {family} of {FAMILIES} gives no {Objective.__name__}; mend its package."
            )
        return found
    raise ValueError(
        f"model.family={family!r} is not known; choose model=groupvit, model=idefics or an experiment that sets it."
    )
