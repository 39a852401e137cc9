"""Base of the three GroupViT models: which part of a checkpoint each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from ..checkpoint import Reader
from ..pretrained import PretrainedModel
from .tensorflow import read_tf_weights

_ROOTS = ("text_model.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class GroupViTPreTrainedModel(PretrainedModel):
    """What `GroupViTModel`, `GroupViTTextModel` and `GroupViTVisionModel` share.

    A single tower loads from its own checkpoints and from those of the whole model.
    """

    weight_readers: ClassVar[Mapping[str, Reader]] = {"tf_model.h5": read_tf_weights}
    tower: ClassVar[Literal["both", "text", "vision"]]
    supports_gradient_checkpointing: ClassVar[bool] = True

    @classmethod
    def rename(cls, name: str) -> str | None:
        # Old files keep the position counter as a weight.
        if name.endswith("embeddings.position_ids"):
            return None
        if cls.tower != "both" and name.startswith(_ROOTS) and not name.startswith(f"{cls.tower}_model."):
            return None
        return name
