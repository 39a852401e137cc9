"""The perceiver resampler (Alayrac et al. 2022): any number of image tokens in, a fixed number of latents
out.

Keys and values come from the image's tokens *and* the latents; norms before, ReLU feed-forward, no biases.

Legend: N images, S tokens an image, M latents, E width, H heads, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import IdeficsConfig


class IdeficsPerceiverAttention(nn.Module):
    """Latents [N, M, E] attend to context [N, S, E] and to themselves."""

    def __init__(self, embed_dim: int, n_heads: int, head_dim: int, qk_layer_norms: bool) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        self.context_layer_norm = nn.LayerNorm(embed_dim)
        self.latents_layer_norm = nn.LayerNorm(embed_dim)
        self.qk_layer_norms = qk_layer_norms
        if qk_layer_norms:
            self.q_layer_norm = nn.LayerNorm(head_dim)
            self.k_layer_norm = nn.LayerNorm(head_dim)
        self.q_proj = nn.Linear(embed_dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(embed_dim, n_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(embed_dim, n_heads * head_dim, bias=False)
        self.output_proj = nn.Linear(n_heads * head_dim, embed_dim, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        both = torch.cat((self.context_layer_norm(context), latents), dim=1)
        query, key, value = (
            x.view(len(x), -1, self.n_heads, self.head_dim).transpose(1, 2)
            for x in (self.q_proj(latents), self.k_proj(both), self.v_proj(both))
        )
        if self.qk_layer_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.output_proj(out.transpose(1, 2).flatten(2))


class IdeficsPerceiverMLP(nn.Module):
    """Norm, widen, ReLU, narrow."""

    def __init__(self, embed_dim: int, intermediate_size: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(embed_dim)
        self.fc = nn.Linear(embed_dim, intermediate_size, bias=False)
        self.c_proj = nn.Linear(intermediate_size, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.fc(self.ln(x))))


class IdeficsPerceiverResampler(nn.Module):
    """Image tokens [N, S, E] to latents [N, M, E]."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__()
        perceiver, embed_dim = config.perceiver_config, config.vision_config.hidden_size
        self.latents = nn.Parameter(torch.empty(perceiver.resampler_n_latents, embed_dim))
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    IdeficsPerceiverAttention(
                        embed_dim,
                        perceiver.resampler_n_heads,
                        perceiver.resampler_head_dim,
                        perceiver.qk_layer_norms_perceiver,
                    ),
                    IdeficsPerceiverMLP(embed_dim, 4 * embed_dim),
                )
            )
            for _ in range(perceiver.resampler_depth)
        )
        self.layer_norm = nn.LayerNorm(embed_dim)

    def reset_parameters(self) -> None:
        """The initialisation IDEFICS was trained from: variance 0.4 / fan-in, residual branches scaled by
        depth.
        """
        nn.init.normal_(self.latents, std=self.latents.shape[1] ** -0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                deviation = math.sqrt(0.4 / module.in_features)
                if name.endswith("c_proj"):
                    deviation /= math.sqrt(2 * len(self.blocks))
                nn.init.normal_(module.weight, std=deviation)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, context: Tensor) -> Tensor:
        latents = self.latents.to(context.dtype).expand(len(context), -1, -1)
        for attention, feed_forward in self.blocks:  # pyright: ignore[reportGeneralTypeIssues]
            latents = latents + attention(context, latents)
            latents = latents + feed_forward(latents)
        return self.layer_norm(latents)
