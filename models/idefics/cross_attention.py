"""The gated block: text looks at images, then a gated feed-forward (Alayrac et al. 2022, section 2.2).

    x = x + tanh(alpha_cross_attn) * attention(norm(x), images)     tokens that see no image take nothing
    x = x + tanh(alpha_dense) * mlp(norm(x))                        every token, with or without images

Legend: B batch, T tokens, C hidden size, H heads, D head dim, U images of the batch, L keys an image, E
image width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import gated_cross_attention, gated_residual, gated_residual_rms_norm
from ..noise import Noise
from .attention import attend
from .configuration import IdeficsConfig
from .image_context import ImageContext
from .layers import IdeficsMLP, IdeficsRMSNorm, dropout


class IdeficsCrossAttention(nn.Module):
    """Queries from text, keys and values from images; no positions, no biases."""

    def __init__(self, config: IdeficsConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.dropout
        self.site = f"cross.{index}.attention"
        width, image_width = config.hidden_size, config.vision_config.hidden_size
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(image_width, inner, bias=False)
        self.v_proj = nn.Linear(image_width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.qk_layer_norms = config.qk_layer_norms
        if config.qk_layer_norms:
            self.q_layer_norm = IdeficsRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_layer_norm = IdeficsRMSNorm(self.head_dim, config.rms_norm_eps)

    def project_images(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [U * L, H, D] of image states [U * L, E]."""
        key = self.k_proj(states).view(-1, self.num_heads, self.head_dim)
        value = self.v_proj(states).view(-1, self.num_heads, self.head_dim)
        return (self.k_layer_norm(key) if self.qk_layer_norms else key), value

    def forward(self, x: Tensor, images: ImageContext, noise: Noise | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        query = self.q_proj(x).view(batch, tokens, self.num_heads, self.head_dim)
        if self.qk_layer_norms:
            query = self.q_layer_norm(query)
        if images.focused is not None:
            return self.o_proj(self._focused(query, images))
        cache = images.cache
        if cache is not None and len(cache.layers) > self.index:
            key, value = cache.layers[self.index]
        else:
            assert images.states is not None
            key, value = self.project_images(images.states)
            if cache is not None:
                cache.layers.append((key, value))
            if images.focus is not None:
                images.focus.add(key, value)
        if images.dense_mask is not None:
            out = self._dense(query, key, value, images.dense_mask, noise)
        else:
            assert images.lists is not None
            out = gated_cross_attention(
                query.reshape(1, batch * tokens, self.num_heads, self.head_dim).transpose(1, 2),
                key[None].transpose(1, 2),
                value[None].transpose(1, 2),
                images.lists,
                image_length=images.image_length,
            ).transpose(1, 2)
        return self.o_proj(out.reshape(batch, tokens, -1))

    def _focused(self, query: Tensor, images: ImageContext) -> Tensor:
        """A decoding step: beams of one prompt are queries of the same keys, which stand in memory once."""
        assert images.focused is not None
        key, value = images.focused.layers[self.index]
        shape = query.shape
        query = query.view(len(key), -1, *shape[2:]).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=images.focused.mask)
        return out.transpose(1, 2).reshape(*shape[:2], -1)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, noise: Noise | None) -> Tensor:
        """With dropout on the probabilities, which the fused operation never builds."""
        batch = len(query)
        key, value = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in (key, value))
        query = query.transpose(1, 2)
        out, _ = attend(
            query, key, value, mask=mask, dropout=self.dropout, noise=noise, site=self.site, weights=True
        )
        return out.transpose(1, 2)


class IdeficsGatedCrossAttentionLayer(nn.Module):
    """One gated block, x [B, T, C] -> [B, T, C]."""

    def __init__(self, config: IdeficsConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.cross_attn = IdeficsCrossAttention(config, index)
        self.mlp = IdeficsMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        shape = (1, 1, config.hidden_size) if config.alpha_type == "vector" else (1,)
        self.alpha_cross_attn = nn.Parameter(torch.empty(shape))
        self.alpha_dense = nn.Parameter(torch.empty(shape))

    def reset_alphas(self) -> None:
        """Fill the gates as ``alpha_initializer`` says."""
        for alpha in (self.alpha_cross_attn, self.alpha_dense):
            if self.config.alpha_initializer == "zeros":
                nn.init.zeros_(alpha)
            elif self.config.alpha_initializer == "ones":
                nn.init.ones_(alpha)
            else:
                nn.init.normal_(alpha, std=self.config.alphas_initializer_range)

    def forward(self, x: Tensor, images: ImageContext | None, noise: Noise | None = None) -> Tensor:
        p, site = self.config.dropout, f"cross.{self.index}"
        norm = self.post_attention_layernorm
        if images is None or (images.focused is not None and not images.focused.layers):
            hidden = norm(x)
        else:
            update = self.cross_attn(self.input_layernorm(x), images, noise)
            update = dropout(update, p, self.training, noise, site + ".residual")
            row_mask = images.focused.row_mask if images.focused is not None else None
            x, hidden = gated_residual_rms_norm(
                x,
                update,
                self.alpha_cross_attn.view(-1),
                norm.weight,
                row_mask,
                norm_eps=norm.variance_epsilon,
            )
        update = dropout(self.mlp(hidden), p, self.training, noise, site + ".mlp")
        return gated_residual(x, update, self.alpha_dense.view(-1))
