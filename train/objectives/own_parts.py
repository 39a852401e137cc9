"""Parts of a run that are the user's own: live objects, made by whoever composed the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OwnParts:
    """What was made of the ``_target_`` nodes that a user typed.

    Attributes:
        callbacks: Lightning callbacks; they come after those of the product.
        loggers: Lightning loggers.
        augment: each from pixels float [B, 3, H, W] in [0, 1], positions int64 [B] and the run's seed to such pixels;
            after the product's own augmentation. Draw from ``interloom.train.data.augment.uniforms``, so that a sample
            looks the same on whatever rank.
        objective: makes the LightningModule, of the arguments of the family's own, which it mostly extends; None for
            the family's own.
    """

    callbacks: Mapping[str, Any] = field(default_factory=dict)
    loggers: Mapping[str, Any] = field(default_factory=dict)
    augment: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[..., Any] | None = None
