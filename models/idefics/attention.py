"""Self-attention of the language model, laid out once a forward pass for all its layers.

A plain causal pass has no mask; padding and caches make a boolean mask; packed documents become segments
that are attended one by one, so that no score between two documents is ever computed: variable-length flash
attention on a GPU, one call a document elsewhere.

Legend: B batch, T queries, K keys, C hidden size, H heads of queries, G of keys and values, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import Noise
from .cache import LayerCache
from .configuration import IdeficsConfig
from .layers import IdeficsRMSNorm, apply_rotary


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    noise: Noise | None = None,
    site: str = "",
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention [B, H, T, D] over [B, G, K, D]; a row whose mask is all false gives zeros.

    G heads of keys serve H / G heads of queries each, one after another. The probabilities [B, H, T, K] are built only
    where they are asked for, or where dropout must follow ``noise``.
    """
    if key.shape[1] != query.shape[1]:
        if query.shape[2] == 1 and not weights and dropout == 0.0:
            # A decoding step: heads that share their keys are queries of the same ones, which are not copied.
            shared = query.reshape(len(query), key.shape[1], -1, query.shape[3])
            out = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask)
            return out.reshape(query.shape), None
        key, value = every_head(key, query.shape[1]), every_head(value, query.shape[1])
    if not weights and (dropout == 0.0 or noise is None):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None
        )
        return out, None
    score = (query @ key.mT).float() * query.shape[-1] ** -0.5
    if causal and mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    if mask is not None:
        score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    probability = score.softmax(-1)
    if mask is not None:
        probability = probability * mask.any(-1, keepdim=True)
    probability = probability.to(query.dtype)
    dropped = probability
    if dropout:
        if noise is None:
            dropped = F.dropout(probability, dropout)
        else:
            # Keys come first in the draw: the same numbers however many images the rest of the batch brings.
            heads, tokens, keys = probability.shape[1:]
            keep = noise.uniform(site, len(query), keys, heads, tokens, device=query.device) >= dropout
            keep = keep.permute(0, 2, 3, 1)
            dropped = probability * keep / (1.0 - dropout)
    return dropped @ value, probability


def every_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, K, D] for each of the H heads of queries [B, H, K, D]."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def has_variable_length(device: torch.device) -> bool:
    """Whether ``torch.nn.attention.varlen`` runs on the device (in two-byte dtypes)."""
    return device.type == "cuda"


@dataclass
class Segments:
    """Documents of a packed batch, as ranges of its B * T tokens.

    ``bounds`` lists (start, stop) in order; the tokens between two of them are padding. What variable-length attention
    takes stands on the device from :meth:`on`, once for all layers: ``edges`` int32 [documents + 1], where each
    begins among the R real tokens, and ``places`` int64 [R] of these among all; None where there is no padding.
    """

    bounds: list[tuple[int, int]]
    tokens: int
    edges: Tensor | None = None
    places: Tensor | None = None

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> Segments:
        """Read int [B, T], -1 for padding.

        Raises:
            ValueError: a document's tokens do not stand together in one row.
        """
        batch, length = document_ids.shape
        ids = document_ids.cpu()
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().flatten()
        stops = torch.cat((starts[1:], torch.tensor([batch * length])))
        owner = ids.flatten()[starts]
        real = owner >= 0
        starts, stops, owner = starts[real], stops[real], owner[real]
        keys = torch.stack((starts // max(length, 1), owner.long()), 1)
        if len(keys) != len(torch.unique(keys, dim=0)):
            raise ValueError(
                "document_ids names a document whose tokens are in two separate places of a row; give every "
                "document of a row its own id and keep its tokens together."
            )
        return cls(list(zip(starts.tolist(), stops.tolist(), strict=True)), batch * length)

    def real_tokens(self, device: torch.device) -> Tensor:
        """Places of all tokens that are no padding, int64 [R]."""
        if not self.bounds:
            return torch.zeros(0, dtype=torch.long, device=device)
        return torch.cat([torch.arange(*bounds) for bounds in self.bounds]).to(device)

    def without_padding(self) -> Segments:
        """The same documents end to end: R tokens."""
        bounds, done = [], 0
        for start, stop in self.bounds:
            bounds.append((done, done + stop - start))
            done += stop - start
        return Segments(bounds, done)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max((stop - start for start, stop in self.bounds), default=0)

    def on(self, device: torch.device) -> Segments:
        """The same with ``edges`` and ``places`` on a GPU: copies from the host that layers then need not make."""
        if self.edges is not None or not has_variable_length(device):
            return self
        ends = list(accumulate((stop - start for start, stop in self.bounds), initial=0))
        edges = torch.tensor(ends, dtype=torch.int32).to(device)
        padded = ends[-1] != self.tokens
        return replace(self, edges=edges, places=self.real_tokens(device) if padded else None)

    def positions(self, device: torch.device) -> Tensor:
        """Place of every token in its document, int64 [B * T]; padding counts on from zero."""
        positions = torch.zeros(self.tokens, dtype=torch.long)
        for start, stop in self.bounds:
            positions[start:stop] = torch.arange(stop - start)
        return positions.to(device)

    def mask(self, batch: int, device: torch.device) -> Tensor:
        """The same as a dense mask, bool [B, 1, T, T]."""
        owner = torch.full((self.tokens,), -1)
        for index, (start, stop) in enumerate(self.bounds):
            owner[start:stop] = index
        owner = owner.view(batch, -1)
        same = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, :, None]
        return same.tril()[:, None].to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
        """Causal attention of [B, T, H, D] over [B, T, G, D] within each document, zeros on padding.

        Args:
            window: tokens that each sees, itself included; None for all before it.
        """
        if has_variable_length(query.device) and query.dtype in (torch.float16, torch.bfloat16):
            return self.on(query.device)._variable_length(query, key, value, window)
        flat = [x.flatten(0, 1) for x in (query, key, value)]  # [B * T, H, D]
        pieces, done = [], 0
        for start, stop in self.bounds:
            if start > done:
                pieces.append(query.new_zeros(start - done, *query.shape[2:]))
            q, k, v = (x[start:stop].transpose(0, 1)[None] for x in flat)
            near = None
            if window is not None and window < stop - start:
                near = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device)
                near = near.tril().triu(1 - window)
            out, _ = attend(q, k, v, mask=near, causal=True)
            pieces.append(out[0].transpose(0, 1))
            done = stop
        if done < self.tokens:
            pieces.append(query.new_zeros(self.tokens - done, *query.shape[2:]))
        return torch.cat(pieces).view(query.shape)

    def _variable_length(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None = None
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if not self.bounds:
            return torch.zeros_like(query)
        flat = [x.flatten(0, 1) for x in (query, key, value)]
        if self.places is not None:
            flat = [x[self.places] for x in flat]
        q, k, v = flat
        edges, longest = self.edges, self.longest
        assert edges is not None
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        # Left unbounded, or to the window; right closed: a query sees no key after itself.
        back = -1 if window is None else window - 1
        out = varlen_attn(q, k, v, edges, edges, longest, longest, window_size=(back, 0))
        assert isinstance(out, Tensor)
        if self.places is not None:
            out = torch.zeros_like(query).flatten(0, 1).index_copy(0, self.places, out)
        return out.view(query.shape)


@dataclass
class AttentionLayout:
    """How the T new tokens attend: to each other causally, under a mask, or within documents.

    Attributes:
        mask: bool [B, 1, T, K], true where a query sees a key; None where causality alone says it.
        causal: queries and keys are the same tokens and no mask is needed.
        segments: packed documents.
        window: tokens that each sees of its document, itself included; None for all before it. A mask says it itself.
        places: (queries [T], keys [K]), where they stand in the text, if not one after another.
    """

    mask: Tensor | None = None
    causal: bool = True
    segments: Segments | None = None
    window: int | None = None
    places: tuple[Tensor, Tensor] | None = None


class IdeficsAttention(nn.Module):
    """The self-attention of LLaMA and its relatives: rotary positions; grouped heads (Ainslie et al. 2023), biases and
    norms of queries and keys where the configuration has them.
    """

    def __init__(self, config: IdeficsConfig, index: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.dropout
        self.site = f"text.{index}.attention"
        width, bias = config.hidden_size, config.attention_bias
        wide, narrow = self.num_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, wide, bias=bias)
        self.k_proj = nn.Linear(width, narrow, bias=bias)
        self.v_proj = nn.Linear(width, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, width, bias=config.attention_output_bias)
        self.q_norm = self.k_norm = None
        if config.text_qk_norms:
            self.q_norm = IdeficsRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = IdeficsRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: AttentionLayout,
        cache: LayerCache | None = None,
        noise: Noise | None = None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*x.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(x).view(shape), self.k_proj(x).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        value = self.v_proj(x).view(shape)
        if cache is not None:
            key, value = cache.update(key, value)
        p = self.dropout if self.training else 0.0
        weights = None
        if layout.segments is not None:
            out = layout.segments.attend(query, key, value, layout.window)
        else:
            out, weights = attend(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                mask=layout.mask,
                causal=layout.causal,
                dropout=p,
                noise=noise,
                site=self.site,
                weights=want_weights,
            )
            out = out.transpose(1, 2)
        return self.o_proj(out.flatten(2)), weights
