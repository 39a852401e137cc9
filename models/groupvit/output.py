"""Output of the whole GroupViT model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..outputs import BaseModelOutputWithPooling, ModelOutput


@dataclass
class GroupViTModelOutput(ModelOutput):
    """B images [B, channels, H, W], M captions, P width of the shared space.

    Attributes:
        loss: mean of the image-to-text and text-to-image InfoNCE of this batch; only with ``return_loss``.
        logits_per_image: [B, M] scaled cosine similarities.
        logits_per_text: [M, B], their transpose.
        segmentation_logits: [B, M, H, W] score of each caption at each pixel; only with
            ``output_segmentation``.
        text_embeds: [M, P] of unit length.
        image_embeds: [B, P] of unit length.
        text_model_output: output of the text tower.
        vision_model_output: output of the image tower.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    segmentation_logits: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
