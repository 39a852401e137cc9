"""Launches of the gated cross-attention kernels: tiles, configurations, and the bytes that they move.

A program of the forward and of the query-gradient kernel owns one tile of R tokens of one head and walks the
images that the tile looks at; a program of the key-value kernel owns BLOCK_N keys of one image and walks the tiles
that look at it. Nothing is accumulated across programs, so repeated runs are bitwise equal; where the key-value
programs are too few to fill the device, the tiles of an image are dealt to P programs, whose float32 partial sums a
last kernel adds in a fixed order.

Bytes moved, exactly, for e bytes an element; over the batch there are M tiles (unused ones too), s tokens in tiles
that look at an image, V visits (pairs of tile and image), v tokens of the tiles of these visits, p those of partial
visits alone, and a pairs of image and program with a share of its tiles; k = ceil(L / BLOCK_N) blocks an image:

    forward    H (M (4 R + 8) + s e D + V (4 k + 2 e L D) + 8 k p + B T (e D + 8))
    query      H (M (4 R + 8) + s (o e D + 12) + V (4 k + 2 e L D) + 8 k p + B T e D)
    key-value  H (8 k P B N + k V (4 R / BLOCK_M + 4 R) + k v (2 e D + 12) + 8 k p + 2 e L D a + 2 w P B N L D)
    sum        2 H B N L D (4 P + e), for P > 1 only

where w = e, or 4 for P > 1, and o = 3, or 2 (``out`` is not read) with one image a token and L <= BLOCK_N. With one
image a token V is at most B (T / R + N), against B N T / R dense.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class, and launch options not at all.
from __future__ import annotations

import torch
import triton

from ._arch import architecture, multiprocessors
from .cross_attention_kernels import (
    gated_cross_attention_backward_key_value_kernel,
    gated_cross_attention_backward_query_kernel,
    gated_cross_attention_backward_sum_kernel,
    gated_cross_attention_forward_kernel,
)
from .image_lists import ImageLists

LOG2_E = 1.4426950408889634

# Per architecture and kernel: (rows a step, keys a step, warps, stages) for two-byte elements and head dims up to
# 128, the largest that compile without spills. The forward and query kernels hold a whole tile, with at least one
# warp to 16 rows, larger where a token sees several images; the key-value kernel takes more keys at once from images
# of more than 64.
FORWARD = {
    "sm_80": (None, 64, 8, 2),
    "sm_90": (None, 64, 4, 2),
    "sm_100": (None, 64, 4, 2),
    "gfx942": (None, 64, 4, 1),
    "interpret": (None, 64, 4, 1),
}
QUERY = {
    "sm_80": (None, 64, 8, 2),
    "sm_90": (None, 64, 4, 2),
    "sm_100": (None, 64, 4, 2),
    "gfx942": (None, 32, 4, 1),
    "interpret": (None, 64, 4, 1),
}
QUERY_SEVERAL = {
    "sm_80": (None, 32, 8, 2),
    "sm_90": (None, 64, 8, 2),
    "sm_100": (None, 64, 8, 2),
    "gfx942": (None, 32, 8, 1),
    "interpret": (None, 64, 4, 1),
}
KEY_VALUE = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (64, 64, 8, 2),
    "sm_100": (64, 64, 8, 2),
    "gfx942": (32, 64, 8, 1),
    "interpret": (64, 64, 4, 1),
}
KEY_VALUE_SEVERAL = KEY_VALUE | {"gfx942": (16, 64, 8, 1)}
KEY_VALUE_LONG = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (32, 128, 8, 2),
    "sm_100": (32, 128, 8, 2),
    "gfx942": (16, 64, 8, 1),
    "interpret": (64, 128, 4, 1),
}
_SUM = {"BLOCK": 1024, "num_warps": 4}
_LONG = 64


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: ImageLists,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, H, T, D] and, for each softmax, its largest score and its inverse sum, [2, B, H, T].

    Scores are in base 2. Both are zero for tokens without an image.
    """
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(query.shape)
    statistics = query.new_empty((2, *query.shape[:3]), dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics
    query, key, value = _unit_columns(query), _unit_columns(key), _unit_columns(value)
    tiles, rows = lists.rows.shape[1:]
    gated_cross_attention_forward_kernel[(tiles * batch * heads,)](
        query,
        key,
        value,
        out,
        statistics,
        lists.mask,
        lists.rows,
        lists.tile_images,
        lists.tile_counts,
        **_strides(q=query, k=key, v=value),
        batch_heads=batch * heads,
        heads=heads,
        tokens=tokens,
        tiles=tiles,
        scale_log2=scale * LOG2_E,
        LISTED=lists.tile_images.shape[2],
        **_constants(query, lists, image_length),
        **_launch(FORWARD, query, rows),
    )
    return out, statistics


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    lists: ImageLists,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query [B, H, T, D], key and value [B, H, S, D]."""
    batch, heads, tokens, _ = query.shape
    d_query = query.new_empty(query.shape)
    if query.numel() == 0:
        return d_query, key.new_zeros(key.shape), value.new_zeros(value.shape)
    grad, query, key, value = (_unit_columns(tensor) for tensor in (grad, query, key, value))
    delta = torch.empty_like(statistics[0])
    tiles, rows = lists.rows.shape[1:]
    constants = _constants(query, lists, image_length)
    common = {
        **_strides(g=grad, q=query, k=key, v=value),
        "batch_heads": batch * heads,
        "heads": heads,
        "tokens": tokens,
        "tiles": tiles,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    gated_cross_attention_backward_query_kernel[(tiles * batch * heads,)](
        grad,
        query,
        key,
        value,
        out,
        statistics,
        delta,
        d_query,
        lists.mask,
        lists.rows,
        lists.tile_images,
        lists.tile_counts,
        **common,
        LISTED=lists.tile_images.shape[2],
        **constants,
        **_launch(QUERY if constants["WORDS"] == 0 else QUERY_SEVERAL, query, rows),
    )

    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    if key.numel() == 0:
        return d_query, *grads
    table = KEY_VALUE if constants["WORDS"] == 0 else KEY_VALUE_SEVERAL
    launch = _launch(table if image_length <= _LONG else KEY_VALUE_LONG, query, rows)
    programs = batch * heads * lists.images * -(-image_length // launch["BLOCK_N"])
    pieces = _pieces(programs, tiles, multiprocessors(query))
    parts = grads if pieces == 1 else query.new_empty((2, pieces, *key.shape), dtype=torch.float32)
    gated_cross_attention_backward_key_value_kernel[(programs * pieces,)](
        grad,
        query,
        key,
        value,
        statistics,
        delta,
        parts[0],
        parts[1],
        lists.mask,
        lists.rows,
        lists.image_tiles,
        lists.image_counts,
        **common,
        images=lists.images,
        TILE=rows,
        PIECES=pieces,
        **constants,
        **launch,
    )
    if pieces > 1:
        for part, whole in zip(parts, grads, strict=True):
            gated_cross_attention_backward_sum_kernel[(triton.cdiv(whole.numel(), _SUM["BLOCK"]),)](
                part, whole, whole.numel(), PIECES=pieces, **_SUM
            )
    return d_query, *grads


def _pieces(programs: int, tiles: int, processors: int) -> int:
    """How many programs share the tiles of an image: a power of two, 1 if the device is busy without."""
    pieces = 1
    while programs * pieces < 2 * processors and pieces * 2 <= min(tiles, 16):
        pieces *= 2
    return pieces


def _launch(table: dict, query: torch.Tensor, rows: int) -> dict[str, int]:
    block_m, block_n, warps, stages = table[architecture(query)]
    if query.element_size() == 4:  # twice the registers and the shared memory
        block_m, block_n, stages = block_m and min(block_m, 32), min(block_n, 64), 1
    if block_m is None:
        block_m, warps = rows, max(warps, rows // 16)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _constants(query: torch.Tensor, lists: ImageLists, image_length: int) -> dict:
    width = query.shape[-1]
    exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "WORDS": 0 if lists.mask.dim() == 2 else lists.mask.shape[2],
        "LENGTH": image_length,
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "PRECISION": "ieee" if exact else "tf32",
    }


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """{"q_b": stride of dimension 0 of q, ...} for the three dimensions before the last."""
    names = {"q": "bht", "g": "bht", "k": "bhn", "v": "bhn"}
    return {
        f"{name}_{dimension}": stride
        for name, tensor in tensors.items()
        for dimension, stride in zip(names[name], tensor.stride(), strict=False)
    }


def _unit_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last, which must be 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
