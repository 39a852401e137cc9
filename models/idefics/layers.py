"""Small parts shared by the blocks: activations, RMS norm, rotary positions, the gated MLP, dropout.

Legend: B batch, T tokens, C hidden size, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from .rope import frequencies

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


# Tokens whose hidden layer is in memory at a time in inference; enough to keep matrix products efficient.
_PIECE_ROWS = {"cpu": 64}
_PIECE_ROWS_GPU = 4096


def activation(act: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function behind a ``hidden_act``, which may be one already."""
    return act if callable(act) else _ACTIVATIONS[act]


class IdeficsRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang, Sennrich 2019), in the dtype of ``x``."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


class IdeficsMLP(nn.Module):
    """LLaMA's gated feed-forward: down(act(gate(x)) * up(x)), without biases unless asked for."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: Any, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.act_fn = activation(hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            gate, up = self.gate_proj(x), self.up_proj(x)
            if torch.compiler.is_compiling() or not (gate.requires_grad or up.requires_grad):
                return self._project_down(gate, up)
            # Of the four tensors of this width only two are kept for backward; the others cost a pass over
            # memory to remake, and recomputation ends before the product with down_proj's weight.
            return checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
                self._project_down, gate, up, use_reentrant=False, preserve_rng_state=False
            )
        # Nothing is kept for backward: a long prompt need not have its widest tensors in memory whole.
        rows = _PIECE_ROWS.get(x.device.type, _PIECE_ROWS_GPU)
        if x.dim() < 3 or x.shape[1] <= rows:
            return self._piece(x)
        return torch.cat([self._piece(piece) for piece in x.split(rows, dim=1)], dim=1)

    def _project_down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(gate) * up)

    def _piece(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).mul_(self.up_proj(x)))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer returns its product with ``x``: autocast's where it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def rotary_tables(
    position_ids: Tensor, head_dim: int, rope: float | Mapping[str, Any] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [B, T, 1, D] of rotary positions for int positions [B, T].

    The sine of the first half carries the minus sign of the rotation, so that ``apply_rotary`` needs no
    negation. ``rope`` is a configuration's ``rope_parameters``, or their ``rope_theta`` alone.
    """
    rope = {"rope_theta": rope} if isinstance(rope, float | int) else rope
    turning, warmth = frequencies(rope, head_dim, position_ids)
    angle = position_ids[..., None].float() * turning  # [B, T, D / 2]
    cos, sin = angle.cos(), angle.sin()
    if warmth != 1.0:
        cos, sin = cos * warmth, sin * warmth
    cos = torch.cat((cos, cos), dim=-1).to(dtype)
    sin = torch.cat((-sin, sin), dim=-1).to(dtype)
    return cos[:, :, None], sin[:, :, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, D] by the tables of ``rotary_tables``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def dropout(x: Tensor, p: float, training: bool, noise: Noise | None, site: str) -> Tensor:
    """Dropout of x [B, …]; with ``noise`` the mask is a function of (seed, sample, site) alone."""
    if not training or p == 0.0:
        return x
    if noise is None:
        return F.dropout(x, p, True)
    keep = noise.uniform(site, x.shape[0], *x.shape[1:], device=x.device) >= p
    return x * keep.to(x.dtype) / (1.0 - p)
