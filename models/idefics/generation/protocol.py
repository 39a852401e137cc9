"""What generation asks of a model, so that it need not know which model it is."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class GeneratingModel(Protocol):
    """A model whose ``forward`` takes prompts and images and returns logits and a cache.

    Attributes:
        config: special ids, the number of layers, whether images pass a resampler.
        generation_config: the checkpoint's options.
        model: its layers, called as :class:`~interloom.models.IdeficsModel` is; ``decode`` takes tokens that are known
            to fit.
        lm_head: states [B, T, C] to logits [B, T, V].
    """

    config: Any
    generation_config: Any
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> Any: ...

    @property
    def lm_head(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...
