"""The grouping block: group tokens claim image tokens (GroupViT, Xu et al., CVPR 2022, section 3.1).

B batch, N image tokens (patches, or groups of the stage before), S group tokens, G output groups, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import group_assign
from ..noise import Noise
from .configuration import GroupViTVisionConfig
from .layers import GroupViTAttention, GroupViTMixerMLP, GroupViTMLP


class GroupViTCrossAttentionLayer(nn.Module):
    """Groups look at the image tokens once before they claim them."""

    def __init__(self, config: GroupViTVisionConfig, site: str):
        super().__init__()
        width = config.hidden_size
        self.attn = GroupViTAttention(config, f"{site}.attention")
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = GroupViTMLP(width, config.intermediate_size, width, config.hidden_act)
        self.norm_post = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, query: Tensor, key: Tensor, noise: Noise | None = None) -> Tensor:
        x = query + self.attn(query, key, noise=noise)[0]
        return self.norm_post(x + self.mlp(self.norm2(x)))


class GroupViTAssignAttention(nn.Module):
    """Single-head attention whose softmax runs over the groups, so image tokens choose a group each."""

    def __init__(self, config: GroupViTVisionConfig, site: str):
        super().__init__()
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.eps = config.assign_eps
        self.hard = config.assign_hard
        self.gumbel = config.gumbel
        self.tau = config.assign_tau
        self.site = site

    def forward(
        self, query: Tensor, key: Tensor, *, return_assignment: bool = False, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Groups [B, G, C] gather image tokens [B, N, C].

        Returns [B, G, C] and, if asked for, the soft noise-free assignment [B, G, N]. Without ``noise``
        (evaluation) the assignment is made without Gumbel noise.
        """
        gumbel = self.gumbel and noise is not None
        out, assignment = group_assign(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(key),
            hard=self.hard,
            gumbel=gumbel,
            tau=self.tau,
            eps=self.eps,
            seed=noise.site(self.site) if gumbel and noise is not None else None,
            row_offset=noise.row_offset if noise is not None else 0,
            return_assignment=return_assignment,
        )
        return self.proj(out), assignment


class GroupViTTokenAssign(nn.Module):
    """Grouping block: [B, N, C] image tokens and [B, S, C] group tokens to [B, G, C]."""

    def __init__(self, config: GroupViTVisionConfig, num_group_token: int, num_output_group: int, site: str):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        tokens_dim, channels_dim = (int(ratio * width) for ratio in config.assign_mlp_ratio)
        self.residual = config.group_residual
        self.norm_tokens = nn.LayerNorm(width, eps=eps)
        self.mlp_inter = GroupViTMixerMLP(num_group_token, tokens_dim, num_output_group, config.hidden_act)
        self.norm_post_tokens = nn.LayerNorm(width, eps=eps)
        self.norm_x = nn.LayerNorm(width, eps=eps)
        self.pre_assign_attn = GroupViTCrossAttentionLayer(config, f"{site}.pre_assign")
        self.assign = GroupViTAssignAttention(config, f"{site}.assign")
        self.norm_new_x = nn.LayerNorm(width, eps=eps)
        self.mlp_channels = GroupViTMLP(width, channels_dim, width, config.hidden_act)

    def forward(
        self,
        image_tokens: Tensor,
        group_tokens: Tensor,
        *,
        return_assignment: bool = False,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        image_tokens = self.norm_x(image_tokens)
        groups = self.norm_post_tokens(self.mlp_inter(self.norm_tokens(group_tokens)))
        groups = self.pre_assign_attn(groups, image_tokens, noise)
        gathered, assignment = self.assign(
            groups, image_tokens, return_assignment=return_assignment, noise=noise
        )
        if self.residual:
            gathered = gathered + groups
        return gathered + self.mlp_channels(self.norm_new_x(gathered)), assignment


@torch.no_grad()
def grouping_maps(attentions: Sequence[Tensor], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Soft membership of each pixel in the final groups, [B, G, height, width].

    Args:
        attentions: soft assignments [B, G_i, N_i] of the grouping stages; N_0 is the patches, row by row.
        grid: patches down and across.
        size: height and width of the result in pixels; the product of the stages is upsampled bilinearly.

    Raises:
        ValueError: no stage groups, so there is no segmentation.
    """
    if not attentions:
        raise ValueError("this vision tower has no grouping stage, so it has no segmentation to return.")
    membership = attentions[0]
    for attention in attentions[1:]:
        membership = attention @ membership
    return F.interpolate(membership.unflatten(-1, grid), size=size, mode="bilinear", align_corners=False)
