"""Float16 with a loss scale, where the module itself unscales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision

from .module import TrainingModule


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
