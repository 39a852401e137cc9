"""Weights a model starts from when it is trained from scratch: those of the original GroupViT.

Transformers leaves first-stage group tokens and position embeddings at zero, where every group token stays
equal to every other; the original draws them. The image tower follows ViT (truncated normal, 0.02), the text
tower follows CLIP (scaled by width and depth); projectors keep PyTorch's initialisation.
"""

from __future__ import annotations

from torch import nn

from .configuration import GroupViTTextConfig, GroupViTVisionConfig
from .grouping import GroupViTAssignAttention
from .layers import GroupViTAttention, GroupViTMLP


def initialize_vision(module: nn.Module, config: GroupViTVisionConfig) -> None:
    """All linear layers of the image tower; the stages and embeddings draw their own parameters."""
    std = config.initializer_range * config.initializer_factor
    for part in module.modules():
        if isinstance(part, nn.Linear) and config.linear_init == "normal":
            nn.init.trunc_normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, GroupViTAssignAttention):
            part.q_proj.weight.data.mul_(config.assign_init_gain)
            part.k_proj.weight.data.mul_(config.assign_init_gain)


def initialize_text(module: nn.Module, config: GroupViTTextConfig) -> None:
    """CLIP's scheme: residual projections shrink with the square root of twice the depth."""
    width, factor = config.hidden_size, config.initializer_factor
    attention_std = width**-0.5 * factor
    residual_std = attention_std * (2 * max(config.num_hidden_layers, 1)) ** -0.5
    for part in module.modules():
        if isinstance(part, GroupViTAttention):
            for projection in (part.q_proj, part.k_proj, part.v_proj):
                nn.init.normal_(projection.weight, std=attention_std)
                nn.init.zeros_(projection.bias)
            nn.init.normal_(part.out_proj.weight, std=residual_std)
            nn.init.zeros_(part.out_proj.bias)
        elif isinstance(part, GroupViTMLP):
            nn.init.normal_(part.fc1.weight, std=(2 * width) ** -0.5 * factor)
            nn.init.normal_(part.fc2.weight, std=residual_std)
