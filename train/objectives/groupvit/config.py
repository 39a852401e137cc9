"""What `interloom train` may be told of a GroupViT: the Hydra group ``model``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ....models.groupvit.configuration import GroupViTConfig, GroupViTTextConfig, GroupViTVisionConfig
from ..schema import hydra_schema

TextSchema = hydra_schema(GroupViTTextConfig)
VisionSchema = hydra_schema(GroupViTVisionConfig)
ModelSchema = hydra_schema(GroupViTConfig, text_config=TextSchema, vision_config=VisionSchema)


@dataclass
class GroupViTTrainConfig:
    """A GroupViT and its objective.

    Args:
        family: which LightningModule trains it.
        config: the fields of ``GroupViTConfig``, nested ones included.
        multi_label: K, the prompts an image whose nouns serve as further positives; 0 leaves that loss out.
        multi_label_weight: its weight beside the captions' loss.
        multi_label_objective: what the prompts are compared with: ``image``, the mean of the groups, as in the
            paper, or ``groups``, each group alone (``group_labels``; a departure for small models).
        share_identical: texts that read the same count as the same text, not as negatives of one another.
        tokenizer: folder with ``tokenizer.json``; None takes that of ``init_checkpoint``.
        init_checkpoint: weights to begin from, anything ``checkpoint=`` takes; None draws them.
    """

    family: str = "groupvit"
    config: ModelSchema = field(default_factory=ModelSchema)  # type: ignore[valid-type]
    multi_label: int = 0
    multi_label_weight: float = 1.0
    multi_label_objective: str = "image"
    share_identical: bool = False
    tokenizer: str | None = None
    init_checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.multi_label < 0:
            raise ValueError(f"model.multi_label={self.multi_label} must be 0 or more prompts an image.")
        if self.multi_label_objective not in ("image", "groups"):
            raise ValueError(
                f"model.multi_label_objective={self.multi_label_objective!r} is not known; use 'image' or 'groups'."
            )

    def model_config(self) -> GroupViTConfig:
        """The configuration of the model itself."""
        values: dict[str, Any] = vars(self.config)
        towers = {name: vars(values[name]) for name in ("text_config", "vision_config")}
        return GroupViTConfig.from_dict({**values, **towers})
