"""Checkpoints of IDEFICS: what older files hold beside the weights, and a model or its decoder from either's
file.
"""

from __future__ import annotations

from typing import ClassVar

from ..pretrained import PretrainedModel
from .configuration import IdeficsConfig

# Tables that earlier releases of Transformers stored and that follow from the configuration.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


class IdeficsPreTrainedModel(PretrainedModel):
    """What ``IdeficsModel`` and ``IdeficsForVisionText2Text`` share."""

    config_class = IdeficsConfig
    config: IdeficsConfig
    supports_gradient_checkpointing: ClassVar[bool] = True

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith(_COMPUTED) else name
