"""Checkpoints of IDEFICS: what older files hold beside the weights, and a model or its decoder from either's
file.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..pretrained import PretrainedModel
from .architecture import beyond_transformers, expand_heads
from .configuration import IdeficsConfig

# Tables that earlier releases of Transformers stored and that follow from the configuration.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


class IdeficsPreTrainedModel(PretrainedModel):
    """What ``IdeficsModel`` and ``IdeficsForVisionText2Text`` share."""

    config_class = IdeficsConfig
    config: IdeficsConfig
    supports_gradient_checkpointing: ClassVar[bool] = True

    def as_transformers(self, state: dict[str, Tensor]) -> tuple[IdeficsConfig, dict[str, Tensor]]:
        if reasons := beyond_transformers(self.config):
            raise ValueError(
                f"Transformers' IDEFICS has no {'; no '.join(reasons)}: it would load the weights and compute "
                "something else. Save it as it is, for this program (interloom convert --format interloom)."
            )
        if self.config.stated("num_key_value_heads") is None:
            return self.config, state
        plain = self.config.with_overrides({"num_key_value_heads": None})
        return plain, expand_heads(state, self.config)

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith(_COMPUTED) else name
