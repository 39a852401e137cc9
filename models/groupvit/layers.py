"""Transformer parts both towers share: MLP, attention, encoder layer, stochastic depth.

B batch, T tokens, S keys, C channels, H heads, D channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from .configuration import GroupViTTextConfig, GroupViTVisionConfig

Activation = str | Callable[[Tensor], Tensor]
TowerConfig = GroupViTTextConfig | GroupViTVisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def activation(act: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a ``hidden_act``, which may be one already."""
    if callable(act):
        return act
    if act not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={act!r} is not known; use one of {', '.join(ACTIVATIONS)}, or give a function."
        )
    return ACTIVATIONS[act]


def run(layer: Callable[..., Any], *inputs: Any, recompute: bool, **options: Any) -> Any:
    """Call a layer; with ``recompute`` it keeps its inputs alone and is computed again in backward.

    Its randomness is a function of the sample (`Noise`), so both times are the same without PyTorch's generator.
    """
    if not recompute:
        return layer(*inputs, **options)
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def recomputes(module: nn.Module) -> bool:
    """Whether a tower with a switch ``gradient_checkpointing`` is to keep inputs of layers alone just now."""
    return bool(module.gradient_checkpointing) and module.training and torch.is_grad_enabled()


def dropout(x: Tensor, rate: float, noise: Noise | None, site: str) -> Tensor:
    """Dropout whose mask is a function of the sample; ``noise=None`` (evaluation) keeps everything."""
    if noise is None or rate == 0.0:
        return x
    keep = noise.uniform(site, x.shape[0], *x.shape[1:], device=x.device) >= rate
    return x * keep.to(x.dtype) / (1.0 - rate)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drop a residual branch for whole samples."""

    def __init__(self, rate: float, site: str):
        super().__init__()
        self.rate = rate
        self.site = site

    def forward(self, x: Tensor, noise: Noise | None) -> Tensor:
        if noise is None or self.rate == 0.0:
            return x
        keep = noise.uniform(self.site, x.shape[0], device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1.0 - self.rate)).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class GroupViTMLP(nn.Module):
    """Linear, activation, linear on the last dimension."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int, hidden_act: Activation):
        super().__init__()
        self.activation_fn = activation(hidden_act)
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class GroupViTMixerMLP(GroupViTMLP):
    """The same across tokens: [B, T_in, C] -> [B, T_out, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GroupViTAttention(nn.Module):
    """Multi-head attention, self or cross."""

    def __init__(self, config: TowerConfig, site: str):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.site = site
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        output_attentions: bool = False,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``x`` [B, T, C] to ``context`` [B, S, C] (None: to itself).

        ``mask`` is added to the scores, [B, 1, T, S]; ``causal`` is its short form without padding.
        Returns the update [B, T, C] and, if asked for, the weights [B, H, T, S].
        """
        source = x if context is None else context
        query, key, value = (
            proj(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj, t in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        weights = None
        if output_attentions or (noise is not None and self.dropout > 0.0):
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
            if causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
            if mask is not None:
                scores = scores + mask
            weights = scores.softmax(-1)
            out = dropout(weights, self.dropout, noise, self.site) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights if output_attentions else None


class GroupViTEncoderLayer(nn.Module):
    """Pre-norm transformer layer.

    With ``mixing=False`` it has no attention: each token goes through the MLP alone.
    """

    def __init__(self, config: TowerConfig, site: str, drop_path: float = 0.0, mixing: bool = True):
        super().__init__()
        width = config.hidden_size
        self.self_attn = GroupViTAttention(config, f"{site}.attention") if mixing else None
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps) if mixing else None
        self.mlp = GroupViTMLP(width, config.intermediate_size, width, config.hidden_act)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.drop_path_attention = DropPath(drop_path, f"{site}.drop_path_attention")
        self.drop_path_mlp = DropPath(drop_path, f"{site}.drop_path_mlp")

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        output_attentions: bool = False,
        noise: Noise | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        weights = None
        if self.self_attn is not None and self.layer_norm1 is not None:
            update, weights = self.self_attn(
                self.layer_norm1(x),
                mask=mask,
                causal=causal,
                output_attentions=output_attentions,
                noise=noise,
            )
            x = x + self.drop_path_attention(update, noise)
        return x + self.drop_path_mlp(self.mlp(self.layer_norm2(x)), noise), weights

    def packed(self, x: Tensor, where: Tensor, ends: Tensor, shape: torch.Size, final: bool) -> Tensor:
        """The layer on packed tokens [L, C] without padding, causal, for a tower without dropout.

        ``where`` int64 [L] are their places in the ``shape`` = [B, T] rectangle. With ``final`` the result is
        [B, C]: the queries are the end tokens (rows ``ends`` of the packed matrix).
        """
        attention = self.self_attn
        assert attention is not None
        assert self.layer_norm1 is not None
        batch, length = shape
        heads = attention.num_heads
        normed = self.layer_norm1(x)

        def rectangle(t: Tensor) -> Tensor:
            full = t.new_zeros(batch * length, t.shape[-1]).index_copy(0, where, t)
            return full.view(batch, length, heads, -1).transpose(1, 2)

        key, value = rectangle(attention.k_proj(normed)), rectangle(attention.v_proj(normed))
        if final:
            x = x.index_select(0, ends)
            query = attention.q_proj(normed.index_select(0, ends)).view(batch, 1, heads, -1).transpose(1, 2)
            allowed = torch.zeros(batch * length, dtype=torch.bool, device=x.device)
            allowed = allowed.index_fill(0, where, True).view(batch, 1, 1, length)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
            out = out.transpose(1, 2).reshape(batch, -1)
        else:
            query = rectangle(attention.q_proj(normed))
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            out = out.transpose(1, 2).reshape(batch * length, -1).index_select(0, where)
        x = x + attention.out_proj(out)
        return x + self.mlp(self.layer_norm2(x))
