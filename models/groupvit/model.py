"""GroupViT: both towers, the projectors into the shared space, and what follows from comparing the two.

B images, M captions, G groups, P width of the shared space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import contrastive_loss
from ..inputs import accepts_collections
from ..noise import Noise
from ..outputs import FeatureOutput
from .checks import active_noise
from .configuration import GroupViTConfig
from .grouping import grouping_maps
from .output import GroupViTModelOutput
from .pretrained import GroupViTPreTrainedModel
from .text import GroupViTTextTransformer
from .vision import GroupViTVisionTransformer

MAX_LOGIT_SCALE = 100.0


def projector(input_size: int, hidden_size: int, output_size: int) -> nn.Sequential:
    """Two-layer MLP with batch norm.

    A trainer on several ranks replaces the batch norm by one with statistics over all of them; parameter and
    buffer names stay the same.
    """
    return nn.Sequential(
        nn.Linear(input_size, hidden_size),
        nn.BatchNorm1d(hidden_size),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_size, output_size),
    )


class GroupViTModel(GroupViTPreTrainedModel):
    """Contrastive image-text model whose image tower groups pixels into segments (Xu et al., CVPR 2022)."""

    config_class = GroupViTConfig
    tower = "both"

    def __init__(self, config: GroupViTConfig):
        super().__init__(config)
        self.config: GroupViTConfig = config
        text, vision, inner = config.text_config, config.vision_config, config.projection_intermediate_dim
        self.text_model = GroupViTTextTransformer(text)
        self.vision_model = GroupViTVisionTransformer(vision)
        self.visual_projection = projector(vision.hidden_size, inner, config.projection_dim)
        self.text_projection = projector(text.hidden_size, inner, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.follow_settings()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def encode_image(self, pixel_values: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Pooled image features before the projector, [B, channels, H, W] -> [B, C]."""
        output = self.vision_model(pixel_values, noise=noise).pooler_output
        assert output is not None
        return output

    def encode_text(self, input_ids: Tensor, *, noise: Noise | None = None) -> Tensor:
        """Pooled caption features before the projector, [M, T] -> [M, C].

        Captions are padded on the right; the cost is that of their real length, not of the padding.
        """
        return self.text_model.pooled(input_ids, noise)

    def scale(self) -> Tensor:
        """Multiplier of the cosine similarities: exp(logit_scale), in training at most 100."""
        scale = self.logit_scale.exp()
        return scale.clamp(max=MAX_LOGIT_SCALE) if self.training else scale

    @accepts_collections("input_ids", "attention_mask", "position_ids")
    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        noise: Noise | None = None,
    ) -> FeatureOutput | tuple:
        """Caption features in the shared space (``pooler_output`` [M, P], not normalised)."""
        if input_ids is None:
            raise ValueError("get_text_features was given no input_ids; pass token ids [M, T].")
        output = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            noise=noise,
        )
        features = FeatureOutput(
            **{**vars(output), "pooler_output": self.text_projection(output.pooler_output)}
        )
        return features if self._flag("return_dict", return_dict) else features.to_tuple()

    @accepts_collections("pixel_values")
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        noise: Noise | None = None,
    ) -> FeatureOutput | tuple:
        """Image features in the shared space (``pooler_output`` [B, P], not normalised)."""
        if pixel_values is None:
            raise ValueError("get_image_features was given no pixel_values; pass images [B, channels, H, W].")
        output = self.vision_model(
            pixel_values,
            output_attentions=self._flag("output_attentions", output_attentions),
            output_hidden_states=self._flag("output_hidden_states", output_hidden_states),
            noise=noise,
        )
        features = FeatureOutput(
            **{**vars(output), "pooler_output": self.visual_projection(output.pooler_output)}
        )
        return features if self._flag("return_dict", return_dict) else features.to_tuple()

    def project_groups(self, groups: Tensor) -> Tensor:
        """Final groups [B, G, C] into the shared space [B, G, P], not normalised."""
        return self.visual_projection(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])

    @accepts_collections("input_ids", "pixel_values", "attention_mask", "position_ids")
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_segmentation: bool | None = None,
        return_dict: bool | None = None,
        *,
        noise: Noise | None = None,
    ) -> GroupViTModelOutput | tuple:
        """Compare images with captions. Tensors may also come as one dictionary or one list in this order.

        Args:
            input_ids: [M, T] token ids, each caption with its end token.
            pixel_values: [B, channels, H, W], normalised; H and W any multiples of the patch size.
            attention_mask: [M, T], 0 at padding.
            position_ids: [M, T] or [1, T]; None counts from 0.
            return_loss: return the symmetric contrastive loss of this batch; needs B = M.
            output_attentions: return soft assignments (image tower) and attention weights (text tower).
            output_hidden_states: return the states of every stage and layer.
            output_segmentation: return scores of every caption at every pixel, [B, M, H, W].
            return_dict: False returns the tuple of what is not None.
            noise: randomness in training mode; None draws a seed from torch's default generator.

        Raises:
            ValueError: an input is missing or does not fit; the message says which.
        """
        if input_ids is None or pixel_values is None:
            missing = "input_ids" if input_ids is None else "pixel_values"
            raise ValueError(
                f"GroupViTModel was given no {missing}; it compares captions with images, so pass both "
                "(or use get_text_features or get_image_features for one side)."
            )
        segmenting = self._flag("output_segmentation", output_segmentation)
        attentions = self._flag("output_attentions", output_attentions) or segmenting
        hidden_states = self._flag("output_hidden_states", output_hidden_states)
        if return_loss and len(input_ids) != len(pixel_values):
            raise ValueError(
                f"return_loss was given {len(pixel_values)} images and {len(input_ids)} captions; the loss "
                "pairs them, so pass as many of one as of the other."
            )
        noise = active_noise(self, noise)
        vision = self.vision_model(
            pixel_values, output_attentions=attentions, output_hidden_states=hidden_states, noise=noise
        )
        text = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=attentions,
            output_hidden_states=hidden_states,
            noise=noise,
        )
        image_embeds = normalize(self.visual_projection(vision.pooler_output))
        text_embeds = normalize(self.text_projection(text.pooler_output))
        scale = self.scale()
        logits_per_text = text_embeds @ image_embeds.t() * scale
        segmentation = None
        if segmenting:
            grid = self.vision_model.embeddings.patch
            size = (pixel_values.shape[-2], pixel_values.shape[-1])
            maps = grouping_maps(vision.attentions, (size[0] // grid[0], size[1] // grid[1]), size)
            groups = normalize(self.project_groups(vision.last_hidden_state))
            # The scale enters twice, as in the published models' Transformers port.
            scores = groups @ text_embeds.t() * scale * scale
            segmentation = torch.einsum("bgm,bghw->bmhw", scores, maps.to(scores.dtype))
        output = GroupViTModelOutput(
            loss=contrastive_loss(image_embeds, text_embeds, scale) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            segmentation_logits=segmentation,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        return output if self._flag("return_dict", return_dict) else output.to_tuple()

    def _flag(self, name: str, value: bool | None) -> bool:
        return bool(getattr(self.config, name) if value is None else value)


def normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


# The name of TensorFlow's class, whose checkpoints and ways of calling are this one's too.
TFGroupViTModel = GroupViTModel
