"""Base of the three GroupViT models: which part of a checkpoint each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..checkpoint import Reader
from ..pretrained import PretrainedModel
from ..received import read_settings
from .configuration import GroupViTConfig
from .tensorflow import read_tf_weights

_ROOTS = ("text_model.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class GroupViTPreTrainedModel(PretrainedModel):
    """What `GroupViTModel`, `GroupViTTextModel` and `GroupViTVisionModel` share.

    A single tower loads from its own checkpoints and from those of the whole model.
    """

    weight_readers: ClassVar[Mapping[str, Reader]] = {"tf_model.h5": read_tf_weights}
    tower: ClassVar[Literal["both", "text", "vision"]]

    @classmethod
    def read_config(cls, path: Path) -> Any:
        if cls.tower != "both" and _model_type(path) == GroupViTConfig.model_type:
            whole = GroupViTConfig.from_json_file(path)
            return whole.text_config if cls.tower == "text" else whole.vision_config
        return super().read_config(path)

    @classmethod
    def rename(cls, name: str) -> str | None:
        # Old files keep the position counter as a weight.
        if name.endswith("embeddings.position_ids"):
            return None
        if cls.tower != "both" and name.startswith(_ROOTS) and not name.startswith(f"{cls.tower}_model."):
            return None
        return name


def _model_type(path: Path) -> str | None:
    try:
        return read_settings(path).get("model_type")
    except ValueError:
        return None  # reading it as a configuration says what is wrong
