"""Launches of the gated cross-attention kernels: tiles, configurations, and the bytes that they move.

Two sets of kernels. Where a token sees one image of at most 64 keys (of two bytes an element), a program of the
forward kernel owns a tile of R tokens of one head, one of the backward kernel all tokens of an image: it makes the
three gradients at once. Otherwise a program of the forward and of the query-gradient kernel owns a part of a tile,
BLOCK_M rows, and walks the images that the tile looks at; one of the key-value kernel owns BLOCK_N keys of an image
and walks the tiles that look at it. Nothing is accumulated across programs, so repeated runs are bitwise equal; where
the programs that own images are too few to fill the device, the tiles of an image are dealt to P programs, whose
float32 partial sums a last kernel adds in a fixed order.

Bytes moved, exactly, for e bytes an element; H heads, w = e, or 4 for P > 1. Over the batch there are M tiles (m of
them without an image, unused ones too), V of the others, s tokens with an image, U tokens rounded up to steps, a
(of images) or b (with those without) programs of the backward kernel with a share of the tiles:

    one forward     H (M (4 R + 8) + 4 U + s e D + 2 e L D V + B T (e D + 8))
    one backward    H (8 P B (N + 1) + 4 R (b + m) + 4 U + s (2 e D + 8) + 2 e L D a + 2 w P B N L D + B T e D)

For the others M counts parts of tiles, s tokens in parts that look at an image, V visits (pairs of part and image), v
tokens of the parts of these visits, p those of partial visits alone; the key-value kernel walks W parts with BLOCK_M
of its own, and with one image a token finds their number from a tile (q = 1, else 0); k = ceil(L / BLOCK_N):

    forward         H (M (4 BLOCK_M + 8) + s e D + V (4 k + 2 e L D) + 8 k p + B T (e D + 8))
    query           H (M (4 BLOCK_M + 8) + s (o e D + 12) + V (4 k + 2 e L D) + 8 k p + B T e D)
    key-value       H (k (8 P B N + 4 W (1 + BLOCK_M) + v (2 e D + 12) + 8 p + 4 q (P B N + R a))
                       + 2 e L D a + 2 w P B N L D)
    sum             2 H B N L D (4 P + e), for P > 1 only

where o = 3, or 2 (``out`` is not read) with one image a token and L <= BLOCK_N.

Work with one image a token: the kernels of the first set round the tokens of an image up to 16, so they compute at
most T + 15 N rows against N T dense: within 1.15 / N wherever the images of a row have 100 tokens each on average.
The others round up to BLOCK_M.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class, and launch options not at all.
from __future__ import annotations

import torch
import triton

from ..common.arch import INTERPRETER, architecture, multiprocessors
from ..common.launch import dot_precision, launch_column, on_its_device
from .image_lists import ImageLists
from .kernels import (
    gated_cross_attention_backward_key_value_kernel,
    gated_cross_attention_backward_query_kernel,
    gated_cross_attention_backward_sum_kernel,
    gated_cross_attention_forward_kernel,
)
from .kernels_one_image import (
    gated_cross_attention_one_backward_kernel,
    gated_cross_attention_one_forward_kernel,
)

Pair = tuple[torch.Tensor, torch.Tensor]
LOG2_E = 1.4426950408889634

# Per architecture and kernel: (rows a step, keys a step, warps, stages) for two-byte elements and head dims up to
# 128, the largest that compile without spills; for float32, whose products are three of tf32 on NVIDIA, one row for
# all. The key-value kernel takes more keys at once from images of more than 64.
FORWARD = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (64, 64, 4, 2),
    "sm_100": (64, 64, 4, 2),
    "gfx942": (64, 64, 4, 1),
    "float32": (16, 32, 8, 1),
    "interpret": (64, 64, 4, 1),
}
FORWARD_SEVERAL = {
    "sm_80": (128, 64, 8, 2),
    "sm_90": (128, 64, 8, 2),
    "sm_100": (128, 64, 8, 2),
    "gfx942": (128, 64, 8, 1),
    "float32": (16, 32, 8, 1),
    "interpret": (128, 64, 4, 1),
}
QUERY = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (64, 64, 4, 2),
    "sm_100": (64, 64, 4, 2),
    "gfx942": (64, 32, 4, 1),
    "float32": (16, 32, 8, 1),
    "interpret": (64, 64, 4, 1),
}
QUERY_SEVERAL = {
    "sm_80": (128, 32, 8, 2),
    "sm_90": (128, 64, 8, 2),
    "sm_100": (128, 64, 8, 2),
    "gfx942": (128, 32, 8, 1),
    "float32": (16, 32, 8, 1),
    "interpret": (128, 64, 4, 1),
}
KEY_VALUE = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (64, 64, 8, 2),
    "sm_100": (64, 64, 8, 2),
    "gfx942": (16, 64, 8, 1),
    "float32": (32, 16, 8, 1),
    "interpret": (64, 64, 4, 1),
}
KEY_VALUE_LONG = {
    "sm_80": (64, 64, 8, 2),
    "sm_90": (32, 128, 8, 2),
    "sm_100": (32, 128, 8, 2),
    "gfx942": (16, 64, 8, 1),
    "float32": (32, 16, 8, 1),
    "interpret": (64, 128, 4, 1),
}
# (tokens a step, warps, stages) where a token sees one image of at most _ONE_KEYS keys.
ONE_FORWARD = {
    "sm_80": (32, 4, 2),
    "sm_90": (32, 4, 2),
    "sm_100": (32, 4, 2),
    "gfx942": (32, 4, 1),
    "interpret": (32, 4, 1),
}
ONE_BACKWARD = {
    "sm_80": (16, 8, 2),
    "sm_90": (32, 8, 2),
    "sm_100": (32, 8, 2),
    "gfx942": (16, 8, 1),
    "interpret": (32, 4, 1),
}
_ONE_KEYS, _ONE_TAIL = 64, 16
_SUM = {"BLOCK": 1024, "num_warps": 4}


@on_its_device
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
    if _is_one(query, lists, image_length):
        gated_cross_attention_one_forward_kernel[(tiles * batch * heads,)](
            query,
            key,
            value,
            out,
            statistics,
            lists.rows,
            lists.tile_images,
            lists.tile_counts,
            **_strides(q=query, k=key, v=value),
            batch_heads=batch * heads,
            heads=heads,
            tokens=tokens,
            tiles=tiles,
            scale_log2=scale * LOG2_E,
            **_one_constants(ONE_FORWARD, query, image_length, rows),
        )
        return out, statistics
    constants = _constants(query, lists, image_length)
    launch = _launch(FORWARD_SEVERAL if constants["SEVERAL"] else FORWARD, query)
    gated_cross_attention_forward_kernel[(tiles * (rows // launch["BLOCK_M"]) * batch * heads,)](
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
        listed=lists.tile_images.shape[2],
        word_count=_word_count(lists),
        **constants,
        TILE=rows,
        **launch,
    )
    return out, statistics


@on_its_device
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
    if query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    d_query = query.new_empty(query.shape)
    grad, query, key, value = (_unit_columns(tensor) for tensor in (grad, query, key, value))
    tiles, rows = lists.rows.shape[1:]
    common = {
        **_strides(g=grad, q=query, k=key, v=value),
        "batch_heads": batch * heads,
        "heads": heads,
        "tokens": tokens,
        "tiles": tiles,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }
    if _is_one(query, lists, image_length):
        return d_query, *_one_backward(
            grad, query, key, value, statistics, d_query, lists, image_length, common
        )
    delta = torch.empty_like(statistics[0])
    constants = _constants(query, lists, image_length)
    launch = _launch(QUERY_SEVERAL if constants["SEVERAL"] else QUERY, query)
    gated_cross_attention_backward_query_kernel[(tiles * (rows // launch["BLOCK_M"]) * batch * heads,)](
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
        listed=lists.tile_images.shape[2],
        word_count=_word_count(lists),
        **constants,
        TILE=rows,
        **launch,
    )

    launch = _launch(KEY_VALUE if image_length <= _ONE_KEYS else KEY_VALUE_LONG, query)
    programs = batch * heads * lists.images * -(-image_length // launch["BLOCK_N"])
    pieces = _pieces(programs, tiles, multiprocessors(query))
    parts, grads = _key_value_grads(key, pieces)
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
        pieces=pieces,
        word_count=_word_count(lists),
        TILE=rows,
        **constants,
        **launch,
    )
    _add_pieces(parts, grads, pieces)
    return d_query, *grads


def _one_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    statistics: torch.Tensor,
    d_query: torch.Tensor,
    lists: ImageLists,
    image_length: int,
    common: dict,
) -> Pair:
    """Fill ``d_query`` and return the gradients of key and value where a token sees one image of few keys."""
    tiles, rows = lists.rows.shape[1:]
    pieces = _pieces(common["batch_heads"] * lists.images, tiles, multiprocessors(query))
    parts, grads = _key_value_grads(key, pieces)
    gated_cross_attention_one_backward_kernel[(common["batch_heads"] * pieces * (lists.images + 1),)](
        grad,
        query,
        key,
        value,
        statistics,
        d_query,
        parts[0],
        parts[1],
        lists.rows,
        lists.image_tiles,
        lists.image_counts,
        **common,
        images=lists.images,
        pieces=pieces,
        **_one_constants(ONE_BACKWARD, query, image_length, rows),
    )
    _add_pieces(parts, grads, pieces)
    return grads


def _key_value_grads(key: torch.Tensor, pieces: int) -> tuple[torch.Tensor | Pair, Pair]:
    """Where the kernel writes, float32 [2, pieces, B, H, S, D] if there are several, and the gradients."""
    grads = key.new_empty(key.shape), key.new_empty(key.shape)
    return (grads if pieces == 1 else key.new_empty((2, pieces, *key.shape), dtype=torch.float32)), grads


def _add_pieces(parts: torch.Tensor | Pair, grads: Pair, pieces: int) -> None:
    if pieces > 1:
        for part, whole in zip(parts, grads, strict=True):
            gated_cross_attention_backward_sum_kernel[(triton.cdiv(whole.numel(), _SUM["BLOCK"]),)](
                part, whole, whole.numel(), pieces, **_SUM
            )


def _is_one(query: torch.Tensor, lists: ImageLists, image_length: int) -> bool:
    """Whether a token sees one image at most, whose keys fit the block of the kernels made for that.

    In float32 their operands would not fit the registers and the shared memory.
    """
    return query.element_size() == 2 and lists.mask.dim() == 2 and image_length <= _ONE_KEYS


def _one_constants(table: dict, query: torch.Tensor, image_length: int, rows: int) -> dict:
    block_m, warps, stages = launch_column(table, query)
    return {
        "LENGTH": image_length,
        **_width_constants(query),
        "TILE": rows,
        "BLOCK_M": block_m,
        "TAIL": _ONE_TAIL,
        "BLOCK_N": _ONE_KEYS,
        "num_warps": warps,
        "num_stages": stages,
    }


def _pieces(programs: int, tiles: int, processors: int) -> int:
    """How many programs share the tiles of an image: a power of two, 1 if the device is busy without."""
    pieces = 1
    while programs * pieces < 2 * processors and pieces * 2 <= min(tiles, 16):
        pieces *= 2
    return pieces


def _launch(table: dict, query: torch.Tensor) -> dict[str, int]:
    exact = query.element_size() == 4 and architecture(query) != INTERPRETER
    block_m, block_n, warps, stages = table["float32"] if exact else launch_column(table, query)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _constants(query: torch.Tensor, lists: ImageLists, image_length: int) -> dict:
    return {
        "SEVERAL": lists.mask.dim() == 3,
        "LENGTH": image_length,
        **_width_constants(query),
    }


def _word_count(lists: ImageLists) -> int:
    """64-bit words a token, of which only the kernels for several images a token know."""
    return lists.mask.shape[2] if lists.mask.dim() == 3 else 0


def _width_constants(query: torch.Tensor) -> dict:
    width = query.shape[-1]
    return {
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "PRECISION": dot_precision(query),
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
