"""How the tokens of one forward pass attend to each other, and where they stand.

Legend: B batch, T new tokens, K tokens so far, C hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .attention import AttentionLayout, Segments
from .cache import IdeficsCache
from .configuration import IdeficsConfig
from .validation import check_text_mask

# A well-packed batch has less padding than this; shapes that change with every batch cost more there.
_PADDING_WORTH_DROPPING = 1 / 32


def lay_out(
    config: IdeficsConfig,
    training: bool,
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    cache: IdeficsCache | None,
    past: int,
    want_weights: bool,
) -> tuple[AttentionLayout, Tensor]:
    """Decide how tokens attend to each other, and their positions."""
    batch, tokens = x.shape[:2]
    if document_ids is not None:
        segments = Segments.from_document_ids(document_ids)
        if position_ids is None:
            position_ids = segments.positions(x.device).view(batch, tokens)
        if want_weights or (training and config.dropout > 0):
            return AttentionLayout(segments.mask(batch, x.device), False), position_ids
        return AttentionLayout(None, False, segments), position_ids
    if cache is not None and cache.static:
        return _static_layout(x, attention_mask, position_ids, cache)
    real = check_text_mask(attention_mask, batch, past + tokens, tokens, cache)
    if position_ids is None:
        if real is None:
            position_ids = torch.arange(past, past + tokens, device=x.device)[None]
        else:
            position_ids = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)[:, past:]
    if cache is not None:
        cache.key_mask = real
    if real is None and (past == 0 or tokens == 1):
        return AttentionLayout(None, past == 0 and tokens > 1), position_ids
    keys = torch.arange(past + tokens, device=x.device)
    mask = (keys <= torch.arange(past, past + tokens, device=x.device)[:, None])[None, None]
    if real is not None:
        mask = mask & real[:, None, None]
    return AttentionLayout(mask, False), position_ids


def within_window(
    layout: AttentionLayout, window: int, tokens: int, cache: IdeficsCache | None, device: torch.device
) -> AttentionLayout:
    """The layout in which a token sees itself and the ``window - 1`` tokens before it alone, padding counted.

    Args:
        tokens: T new ones; the ``cache`` does not have them yet.
    """
    if layout.segments is not None:
        return replace(layout, window=window) if layout.segments.longest > window else layout
    if layout.places is not None:
        queries, keys = layout.places
    elif cache is not None and cache.static:
        position: Tensor = cache.position  # pyright: ignore[reportAttributeAccessIssue]
        assert cache.key_mask is not None
        queries = position + torch.arange(tokens, device=device)
        keys = torch.arange(cache.key_mask.shape[1], device=device)
    else:
        past = 0 if cache is None else cache.get_seq_length()
        if past + tokens <= window:
            return layout
        queries = torch.arange(past, past + tokens, device=device)
        keys = torch.arange(past + tokens, device=device)
    near = keys > queries[:, None] - window  # [T, K]
    if layout.mask is None:
        return AttentionLayout((near & (keys <= queries[:, None]))[None, None], False)
    return AttentionLayout(layout.mask & near, False)


def drop_padding(layout: AttentionLayout, device: torch.device) -> tuple[AttentionLayout, Tensor | None]:
    """Leave the padding of packed rows out of all layers, where there is enough of it to be worth the copies.

    What layers need of the documents on the device is put there here, once.

    Returns:
        The layout of the R real tokens end to end, and their places int64 [R] among the B * T; or the layout as
        it is, and None.
    """
    segments = layout.segments
    if segments is None:
        return layout, None
    if torch.compiler.is_compiling():
        return replace(layout, segments=segments.on(device)), None
    dense = segments.without_padding()
    if not 0 < dense.tokens < (1 - _PADDING_WORTH_DROPPING) * segments.tokens:
        return replace(layout, segments=segments.on(device)), None
    return AttentionLayout(None, False, dense.on(device)), segments.real_tokens(device)


def restore_padding(x: Tensor, real: Tensor, batch: int, tokens: int) -> Tensor:
    """[1, R, C] -> [B, T, C] with zeros where nothing real stands."""
    padded = x.new_zeros(batch * tokens, x.shape[-1])
    return padded.index_copy(0, real, x[0]).view(batch, tokens, -1)


def _static_layout(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: IdeficsCache
) -> tuple[AttentionLayout, Tensor]:
    tokens = x.shape[1]
    position: Tensor = cache.position  # pyright: ignore[reportAttributeAccessIssue]
    real = cache.key_mask
    assert real is not None
    if attention_mask is not None:
        if attention_mask.shape[1] > real.shape[1] or attention_mask.shape[0] != real.shape[0]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but the static cache holds "
                f"{tuple(real.shape)}; make the cache longer or the mask shorter."
            )
        real[:, : attention_mask.shape[1]] = attention_mask.bool()
    where = position + torch.arange(tokens, device=x.device)
    if position_ids is None:
        counted = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
        position_ids = counted.index_select(1, where)
    keys = torch.arange(real.shape[1], device=x.device)
    mask = (keys <= where[:, None])[None, None] & real[:, None, None]
    return AttentionLayout(mask, False), position_ids
