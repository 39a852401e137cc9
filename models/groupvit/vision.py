"""The image tower: patches, stages of transformer layers, and the grouping blocks between them.

B batch, H and W pixels, N image tokens, S group tokens, G groups, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..inputs import accepts_collections
from ..noise import Noise
from ..outputs import BaseModelOutputWithPooling
from .checks import active_noise, check_pixels
from .configuration import GroupViTVisionConfig
from .grouping import GroupViTTokenAssign
from .initialization import initialize_vision
from .layers import GroupViTEncoderLayer, GroupViTMixerMLP, dropout, recomputes, run
from .pretrained import GroupViTPreTrainedModel


class GroupViTPatchEmbeddings(nn.Module):
    """[B, channels, H, W] pixels to [B, N, C], patches row by row."""

    def __init__(self, config: GroupViTVisionConfig):
        super().__init__()
        patch = config.patch_hw
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class GroupViTVisionEmbeddings(nn.Module):
    """Normed patches plus learned positions, which are interpolated for other image sizes."""

    def __init__(self, config: GroupViTVisionConfig):
        super().__init__()
        (height, width), (patch_height, patch_width) = config.image_hw, config.patch_hw
        self.patch = (patch_height, patch_width)
        self.grid = (height // patch_height, width // patch_width)
        self.dropout = config.dropout
        self.patch_embeddings = GroupViTPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(
            torch.empty(1, self.grid[0] * self.grid[1], config.hidden_size)
        )
        self.position_std = config.initializer_range * config.initializer_factor
        self.reset_parameters()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.position_embeddings, std=self.position_std)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [1, N, C] for ``grid`` patches down and across (bicubic)."""
        if grid == self.grid:
            return self.position_embeddings
        table = self.position_embeddings.unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(table.float(), size=grid, mode="bicubic", align_corners=False)
        return resized.to(table.dtype).flatten(2).transpose(1, 2)

    def forward(self, pixel_values: Tensor, noise: Noise | None = None) -> Tensor:
        grid = (pixel_values.shape[-2] // self.patch[0], pixel_values.shape[-1] // self.patch[1])
        x = self.layernorm(self.patch_embeddings(pixel_values)) + self.positions(grid)
        return dropout(x, self.dropout, noise, "vision.embeddings.dropout")


class GroupViTStage(nn.Module):
    """Transformer layers over image and group tokens, then (if the stage has group tokens) the grouping."""

    def __init__(self, config: GroupViTVisionConfig, index: int, drop_path: list[float]):
        super().__init__()
        self.num_group_token = config.num_group_tokens[index]
        previous = config.num_group_tokens[index - 1] if index > 0 else 0
        width, site = config.hidden_size, f"vision.stage{index}"
        mixing = self.num_group_token > 0 or config.group_mixing == "attention"
        self.layers = nn.ModuleList(
            GroupViTEncoderLayer(config, f"{site}.layer{i}", drop_path[i], mixing)
            for i in range(config.depths[index])
        )
        self.group_token: nn.Parameter | None = None
        self.downsample: GroupViTTokenAssign | None = None
        self.group_projector: nn.Sequential | None = None
        if self.num_group_token > 0:
            self.group_token = nn.Parameter(torch.zeros(1, self.num_group_token, width))
            self.downsample = GroupViTTokenAssign(
                config, self.num_group_token, config.num_output_groups[index], site
            )
            if previous > 0:
                self.group_projector = nn.Sequential(
                    nn.LayerNorm(width, eps=config.layer_norm_eps),
                    GroupViTMixerMLP(previous, width // 2, self.num_group_token, config.hidden_act),
                )
            self.token_std = 0.0 if previous > 0 else config.group_token_std * config.initializer_factor
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the group tokens of a first stage; later stages get theirs from the stage before."""
        if self.group_token is not None and self.token_std:
            # Tokens that start equal stay equal.
            std, bound = self.token_std, 2 * max(self.token_std, 1.0)
            nn.init.trunc_normal_(self.group_token, std=std, a=-bound, b=bound)

    def forward(
        self,
        x: Tensor,
        previous_tokens: Tensor | None,
        *,
        return_assignment: bool = False,
        noise: Noise | None = None,
        recompute: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Image tokens [B, N, C] and the group tokens of the stage before, [B, S', C] or None.

        Returns the new image tokens ([B, G, C] after a grouping), the group tokens [B, S, C] and the soft
        assignment [B, G, N].
        """
        if self.group_token is None or self.downsample is None:
            for layer in self.layers:
                x = run(layer, x, noise=noise, recompute=recompute)[0]
            return x, None, None
        tokens = self.group_token.expand(x.shape[0], -1, -1)
        if self.group_projector is not None and previous_tokens is not None:
            tokens = tokens + self.group_projector(previous_tokens)
        joined = torch.cat([x, tokens.to(x.dtype)], dim=1)
        for layer in self.layers:
            joined = run(layer, joined, noise=noise, recompute=recompute)[0]
        x, tokens = joined[:, : -self.num_group_token], joined[:, -self.num_group_token :]
        x, assignment = self.downsample(x, tokens, return_assignment=return_assignment, noise=noise)
        return x, tokens, assignment


class GroupViTVisionEncoder(nn.Module):
    def __init__(self, config: GroupViTVisionConfig):
        super().__init__()
        total = sum(config.depths)
        rates = [config.drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        self.stages = nn.ModuleList()
        for index, depth in enumerate(config.depths):
            first = sum(config.depths[:index])
            self.stages.append(GroupViTStage(config, index, rates[first : first + depth]))


class GroupViTVisionTransformer(nn.Module):
    """The tower without its loader; `GroupViTVisionModel` and `GroupViTModel` hold one."""

    def __init__(self, config: GroupViTVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = GroupViTVisionEmbeddings(config)
        self.encoder = GroupViTVisionEncoder(config)
        self.gradient_checkpointing = False
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        initialize_vision(self, config)

    def blocks(self) -> list[nn.Module]:
        """Layers and grouping blocks in the order they run: units of sharding."""
        found: list[nn.Module] = []
        for stage in self.encoder.stages:
            assert isinstance(stage, GroupViTStage)
            found += [*stage.layers, *([] if stage.downsample is None else [stage.downsample])]
        return found

    def tables(self) -> list[nn.Module]:
        """What holds weights beside the blocks: group tokens of the stages, and the embeddings."""
        with_tokens = [stage for stage in self.encoder.stages if stage.group_token is not None]
        return [*with_tokens, self.embeddings]

    def active_noise(self, noise: Noise | None) -> Noise | None:
        """The randomness of a forward pass (:func:`.checks.active_noise`)."""
        return active_noise(self, noise)

    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling:
        """[B, channels, H, W] to groups [B, G, C] and their mean [B, C]. See `GroupViTVisionModel`."""
        check_pixels(self, pixel_values, self.config)
        noise = self.active_noise(noise)
        x = self.embeddings(pixel_values, noise)
        tokens = None
        hidden_states: tuple[Tensor, ...] = (x,)
        attentions: tuple[Tensor, ...] = ()
        for stage in self.encoder.stages:
            x, tokens, assignment = stage(
                x,
                tokens,
                return_assignment=output_attentions,
                noise=noise,
                recompute=recomputes(self),
            )
            hidden_states = (*hidden_states, x)
            if assignment is not None:
                attentions = (*attentions, assignment)
        last = self.layernorm(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last.mean(1),
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )


class GroupViTVisionModel(GroupViTPreTrainedModel):
    """The image tower alone; loads from its own checkpoints and from those of the whole model."""

    config_class = GroupViTVisionConfig
    tower = "vision"
    main_input_name = "pixel_values"

    def __init__(self, config: GroupViTVisionConfig):
        super().__init__(config)
        self.config: GroupViTVisionConfig = config
        self.vision_model = GroupViTVisionTransformer(config)
        self.follow_settings()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embeddings

    @accepts_collections("pixel_values")
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode images.

        Args:
            pixel_values: [B, channels, H, W], normalised; H and W any multiples of the patch size.
            output_attentions: return the soft assignment [B, G, N] of each grouping stage.
            output_hidden_states: return the input of each stage and the output of the last.
            return_dict: False returns the tuple of what is not None.
            noise: randomness in training mode; None draws a seed from torch's default generator.

        Raises:
            ValueError: no images, or a wrong shape, channel count or type, or values that are not finite.
        """
        if pixel_values is None:
            raise ValueError(
                "GroupViTVisionModel was given no pixel_values; pass images [B, channels, H, W]."
            )
        config = self.config
        output = self.vision_model(
            pixel_values,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            noise=noise,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


# The name of TensorFlow's class, whose checkpoints and ways of calling are this one's too.
TFGroupViTVisionModel = GroupViTVisionModel
