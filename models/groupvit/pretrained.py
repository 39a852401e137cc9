"""Base of the three GroupViT models: configuration, devices, and their checkpoints."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..configuration import ModelConfig


class GroupViTPreTrainedModel(nn.Module):
    """What `GroupViTModel`, `GroupViTTextModel` and `GroupViTVisionModel` share."""

    config_class: ClassVar[type[ModelConfig]]
    tower: ClassVar[Literal["both", "text", "vision"]]

    def __init__(self, config: Any):
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} was given a {type(config).__name__}; "
                f"expected a {self.config_class.__name__}."
            )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
