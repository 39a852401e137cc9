"""GroupViT's image tower (Xu et al. 2022): the keys of an image are its groups, a few vectors of an object each.

Where other towers need a resampler to make hundreds of patches a few vectors, grouping has done that already, and each
group comes with the pixels it took: what a word attends to can be drawn (`attention_map`).

Legend: B images, N patches, G groups, C channels, T text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...groupvit.grouping import grouping_maps
from ...groupvit.initialization import initialize_vision
from ...groupvit.vision import GroupViTVisionTransformer
from ...noise import Noise
from ...outputs import BaseModelOutputWithPooling
from .configuration import IdeficsGroupViTConfig


class IdeficsGroupViTTransformer(GroupViTVisionTransformer):
    """Images [B, 3, height, width] of any size to groups [B, G, C].

    Weights have the names of GroupViT's own ``vision_model``. Training draws no noise: the same image gives the same
    groups, hard assignments pass gradients straight through.
    """

    config: IdeficsGroupViTConfig

    def __init__(self, config: IdeficsGroupViTConfig) -> None:
        super().__init__(config)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixels and the residual stream: that of the norms."""
        return self.layernorm.weight.dtype

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights, as the original GroupViT does."""
        for part in self.modules():
            if part is not self and (draw := getattr(part, "reset_parameters", None)) is not None:
                draw()
        initialize_vision(self, self.config)

    def active_noise(self, noise: Noise | None) -> None:
        return None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode images, as the other towers do; ``attentions`` are the soft assignments [B, G_i, N_i] of the stages.

        Raises:
            ValueError: the images are not of whole patches.
        """
        config = self.config
        return super().forward(
            pixel_values,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        )


@torch.no_grad()
def attention_map(
    assignments: Sequence[Tensor],
    weights: Tensor,
    size: tuple[int, int] | None = None,
    *,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Where text tokens look, from their attention over an image's groups: [B, …, height, width].

    A pixel's value is the attention that its groups get, weighted by its soft membership in each: weights that sum
    to 1 give values from 0 to 1.

    Args:
        assignments: soft assignments [B, G_i, N_i] of the grouping stages, ``attentions`` of the tower's output with
            ``output_attentions=True``; or of one image, without B.
        weights: [B, …, G], attention of text tokens (heads, layers) over the last stage's groups; [G] of one image.
        size: height and width of the map in pixels; the grid of patches by default.
        grid: patches down and across; a square by default.

    Raises:
        ValueError: shapes do not fit each other, there is no assignment, or the patches are no square.
    """
    single = bool(assignments) and assignments[0].dim() == 2
    if single:
        assignments, weights = [a[None] for a in assignments], weights[None]
    if not assignments or weights.shape[:1] + weights.shape[-1:] != assignments[-1].shape[:2]:
        given = [tuple(a.shape) for a in assignments]
        raise ValueError(
            f"weights has shape {tuple(weights.shape)} and assignments {given}; give weights [B, …, G] over the groups "
            "of the last of assignments [B, G, N]."
        )
    patches = assignments[0].shape[-1]
    side = math.isqrt(patches)
    if grid is None and side * side != patches:
        raise ValueError(f"{patches} patches are no square; give grid=(patches down, patches across).")
    grid = (side, side) if grid is None else grid
    membership = grouping_maps(assignments, grid, grid if size is None else size)  # [B, G, height, width]
    rows = weights.reshape(len(weights), -1, weights.shape[-1]).to(membership)
    maps = torch.einsum("bxg,bghw->bxhw", rows, membership)
    maps = maps.reshape(*weights.shape[:-1], *maps.shape[-2:])
    return maps[0] if single else maps
