"""Launches of the gated cross-attention kernels: tiles, configurations, and the bytes that they move.

Two sets of kernels. Where a token sees one image of at most 64 keys (of two bytes an element), a program of the
forward kernel owns a tile of R tokens of one head, one of the backward kernel all tokens of an image: it makes the
three gradients at once. Otherwise a program of the forward and of the query-gradient kernel owns a part of a tile,
BLOCK_M rows, and walks the images that the tile looks at; one of the key-value kernel owns BLOCK_N keys of an image
and walks the tiles that look at it. Nothing is accumulated across programs, so repeated runs are bitwise equal; where
the programs that own images are too few to fill the device, the tiles of an image are dealt to P programs, whose
float32 partial sums a last kernel adds in a fixed order.

``bytes_moved`` says what that costs.

Work with one image a token: the kernels of the first set round the tokens of an image up to 16, so of T tokens and
N images they compute at most T + 15 N rows against N T dense: within 1.15 / N wherever the images of a row have 100
tokens each on average. The others round up to BLOCK_M.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class, and launch options not at all.
from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..common.arch import INTERPRETER, architecture, multiprocessors
from ..common.launch import dot_precision, launch_column, on_its_device
from ..common.traffic import Floor, Traffic, float32_sum_bytes
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
    "sm_80": (64, 64, 8, 2), "sm_90": (64, 64, 4, 2), "sm_100": (64, 64, 4, 2),
    "gfx942": (64, 64, 4, 1), "float32": (16, 32, 8, 1), "interpret": (64, 64, 4, 1),
}  # fmt: skip
FORWARD_SEVERAL = {
    "sm_80": (128, 64, 8, 2), "sm_90": (128, 64, 8, 2), "sm_100": (128, 64, 8, 2),
    "gfx942": (128, 64, 8, 1), "float32": (16, 32, 8, 1), "interpret": (128, 64, 4, 1),
}  # fmt: skip
QUERY = {
    "sm_80": (64, 64, 8, 2), "sm_90": (64, 64, 4, 2), "sm_100": (64, 64, 4, 2),
    "gfx942": (64, 32, 4, 1), "float32": (16, 32, 8, 1), "interpret": (64, 64, 4, 1),
}  # fmt: skip
QUERY_SEVERAL = {
    "sm_80": (128, 32, 8, 2), "sm_90": (128, 64, 8, 2), "sm_100": (128, 64, 8, 2),
    "gfx942": (128, 32, 8, 1), "float32": (16, 32, 8, 1), "interpret": (128, 64, 4, 1),
}  # fmt: skip
KEY_VALUE = {
    "sm_80": (64, 64, 8, 2), "sm_90": (64, 64, 8, 2), "sm_100": (64, 64, 8, 2),
    "gfx942": (16, 64, 8, 1), "float32": (32, 16, 8, 1), "interpret": (64, 64, 4, 1),
}  # fmt: skip
KEY_VALUE_LONG = {
    "sm_80": (64, 64, 8, 2), "sm_90": (32, 128, 8, 2), "sm_100": (32, 128, 8, 2),
    "gfx942": (16, 64, 8, 1), "float32": (32, 16, 8, 1), "interpret": (64, 128, 4, 1),
}  # fmt: skip
# (tokens a step, warps, stages) where a token sees one image of at most _ONE_KEYS keys.
ONE_FORWARD = {
    "sm_80": (32, 4, 2), "sm_90": (32, 4, 2), "sm_100": (32, 4, 2), "gfx942": (32, 4, 1), "interpret": (32, 4, 1),
}  # fmt: skip
ONE_BACKWARD = {
    "sm_80": (16, 8, 2), "sm_90": (32, 8, 2), "sm_100": (32, 8, 2), "gfx942": (16, 8, 1), "interpret": (32, 4, 1),
}  # fmt: skip
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
            query, key, value, out, statistics, lists.rows, lists.tile_images, lists.tile_counts,
            **_strides(q=query, k=key, v=value), batch_heads=batch * heads, heads=heads, tokens=tokens, tiles=tiles,
            scale_log2=scale * LOG2_E, **_one_constants(ONE_FORWARD, query, image_length, rows),
        )  # fmt: skip
        return out, statistics
    constants = _constants(query, lists, image_length)
    launch = _launch(FORWARD_SEVERAL if _several(lists) else FORWARD, query)
    gated_cross_attention_forward_kernel[(tiles * (rows // launch["BLOCK_M"]) * batch * heads,)](
        query, key, value, out, statistics, lists.mask, lists.rows, lists.tile_images, lists.tile_counts,
        **_strides(q=query, k=key, v=value), batch_heads=batch * heads, heads=heads, tokens=tokens, tiles=tiles,
        scale_log2=scale * LOG2_E, listed=lists.tile_images.shape[2], word_count=_word_count(lists),
        **constants, TILE=rows, **launch,
    )  # fmt: skip
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
    launch = _launch(QUERY_SEVERAL if _several(lists) else QUERY, query)
    gated_cross_attention_backward_query_kernel[(tiles * (rows // launch["BLOCK_M"]) * batch * heads,)](
        grad, query, key, value, out, statistics, delta, d_query, lists.mask, lists.rows, lists.tile_images,
        lists.tile_counts, **common, listed=lists.tile_images.shape[2], word_count=_word_count(lists),
        **constants, TILE=rows, **launch,
    )  # fmt: skip

    launch = _key_value_launch(query, image_length)
    programs = batch * heads * lists.images * -(-image_length // launch["BLOCK_N"])
    pieces = _pieces(programs, tiles, multiprocessors(query))
    parts, grads = _key_value_grads(key, pieces)
    gated_cross_attention_backward_key_value_kernel[(programs * pieces,)](
        grad, query, key, value, statistics, delta, parts[0], parts[1], lists.mask, lists.rows, lists.image_tiles,
        lists.image_counts, **common, images=lists.images, pieces=pieces, word_count=_word_count(lists), TILE=rows,
        **constants, **launch,
    )  # fmt: skip
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
        grad, query, key, value, statistics, d_query, parts[0], parts[1], lists.rows, lists.image_tiles,
        lists.image_counts, **common, images=lists.images, pieces=pieces,
        **_one_constants(ONE_BACKWARD, query, image_length, rows),
    )  # fmt: skip
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


def _several(lists: ImageLists) -> bool:
    """Whether a token may see several images, which words of bits then name."""
    return lists.mask.dim() == 3


def _is_one(query: torch.Tensor, lists: ImageLists, image_length: int) -> bool:
    """Whether a token sees one image at most, whose keys fit the block of the kernels made for that.

    In float32 their operands would not fit the registers and the shared memory.
    """
    return query.element_size() == 2 and not _several(lists) and image_length <= _ONE_KEYS


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


def _key_value_launch(query: torch.Tensor, image_length: int) -> dict[str, int]:
    return _launch(KEY_VALUE if image_length <= _ONE_KEYS else KEY_VALUE_LONG, query)


def _constants(query: torch.Tensor, lists: ImageLists, image_length: int) -> dict:
    return {
        "SEVERAL": _several(lists),
        "LENGTH": image_length,
        **_width_constants(query),
    }


def _word_count(lists: ImageLists) -> int:
    """64-bit words a token, of which only the kernels for several images a token know."""
    return lists.mask.shape[2] if _several(lists) else 0


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


class _Moved(NamedTuple):
    """Bytes that a kernel moves for one head: of the operands, and of the lists that say where to look."""

    operands: int
    lists: int


def bytes_moved(query: torch.Tensor, lists: ImageLists, image_length: int) -> Traffic:
    """Bytes of :func:`forward` and :func:`backward`, exactly.

    The floor is the same without the lists: a tile of tokens reads the keys and values of every image that it looks
    at, and an image's gradients are written once, or once a piece and added.

    Args:
        query: [B, H, T, D]; of it only shape, dtype and device count, so ``meta`` will do.
        lists: those of the batch, with tiles.
        image_length: keys an image.
    """
    heads, processors = query.shape[1], multiprocessors(query)
    images, tiles = query.shape[0] * lists.images, lists.rows.shape[1]
    one = _is_one(query, lists, image_length)
    blocks = 1 if one else -(-image_length // _key_value_launch(query, image_length)["BLOCK_N"])
    pieces = _pieces(images * heads * blocks, tiles, processors)
    parts = _one_bytes if one else _list_bytes
    forward, backward = parts(query, lists, image_length, pieces)
    if not images:
        backward = {}
    elif pieces > 1:
        numbers = 2 * images * image_length * query.shape[3]
        backward["backward_sum"] = _Moved(float32_sum_bytes(pieces, numbers, query.element_size()), 0)
    named = [
        {f"gated_cross_attention_{name}_kernel": heads * sum(moved) for name, moved in kernels.items()}
        for kernels in (forward, backward)
    ]
    floors = (heads * sum(m.operands for m in kernels.values()) for kernels in (forward, backward))
    return Traffic(*named, Floor(*floors))


def _one_bytes(
    query: torch.Tensor, lists: ImageLists, image_length: int, pieces: int
) -> tuple[dict[str, _Moved], dict[str, _Moved]]:
    """Of the kernels where a token sees one image of few keys: for one head, by name."""
    batch, _, tokens, width = query.shape
    tiles, tile = lists.rows.shape[1:]
    row_bytes, maps = width * query.element_size(), batch * tokens * width * query.element_size()
    in_tile = (lists.rows >= 0).sum(-1)  # tokens of a tile, [B, M]
    seen = lists.tile_counts[..., 1] > 0  # whether they have an image
    looking, keys_and_values = int(in_tile[seen].sum()), 2 * image_length * row_bytes

    step, _, _ = launch_column(ONE_FORWARD, query)
    walked = _rounded(in_tile[seen], step, _ONE_TAIL).sum() + _rounded(in_tile[~seen], step, step).sum()
    forward = _Moved(
        looking * row_bytes + int(seen.sum()) * keys_and_values + maps + 8 * batch * tokens,
        batch * tiles * (4 * tile + 8) + 4 * int(walked),
    )
    if not lists.images:
        return {"one_forward": forward}, {}

    # The tiles of an image are shared by pieces; those after the last image's, of tokens without one, by as many.
    step, _, _ = launch_column(ONE_BACKWARD, query)
    first, count = lists.image_tiles[..., 0].long(), lists.image_counts[..., 1].long()  # [B, N]
    rest = first[:, -1:] + count[:, -1:]
    first, count = torch.cat([first, rest], 1), torch.cat([count, tiles - rest], 1)
    share = -(-count // pieces)
    begins = (share[..., None] * torch.arange(pieces)).minimum(count[..., None])  # [B, N + 1, pieces]
    ends = (begins + share[..., None]).minimum(count[..., None])
    tokens_before = torch.nn.functional.pad(in_tile.cumsum(1), (1, 0))[:, None].expand(-1, count.shape[1], -1)
    in_piece = tokens_before.gather(2, first[..., None] + ends)
    in_piece = in_piece - tokens_before.gather(2, first[..., None] + begins)
    working = ends > begins
    walked = int(_rounded(in_piece[:, :-1], step, _ONE_TAIL).sum() + (tiles - rest).sum() * tile)
    written = (
        2 * (4 if pieces > 1 else query.element_size()) * pieces * batch * lists.images * image_length * width
    )
    backward = _Moved(
        looking * (2 * row_bytes + 8) + int(working[:, :-1].sum()) * keys_and_values + written + maps,
        8 * pieces * batch * (lists.images + 1) + 4 * tile * int(working.sum()) + 4 * walked,
    )
    return {"one_forward": forward}, {"one_backward": backward}


def _rounded(tokens: torch.Tensor, step: int, tail: int) -> torch.Tensor:
    """Tokens rounded up to steps, the last of which may be a tail."""
    main = (tokens + step - 1 - tail % step) // step * step
    return main + -(-(tokens - main).clamp(min=0) // tail) * tail


def _list_bytes(
    query: torch.Tensor, lists: ImageLists, image_length: int, pieces: int
) -> tuple[dict[str, _Moved], dict[str, _Moved]]:
    """Of the other kernels, which walk lists of images and of tiles: for one head, by name."""
    batch, _, tokens, width = query.shape
    several, tile = _several(lists), lists.rows.shape[2]
    row_bytes, maps = width * query.element_size(), batch * tokens * width * query.element_size()
    in_tile = (lists.rows >= 0).sum(-1)
    full, seen = lists.tile_counts.long().unbind(-1)
    looking = int(in_tile[seen > 0].sum())
    token_visits = int((seen * in_tile).sum())  # tokens, summed over the images that their tile looks at
    masked_visits = int(((seen - full) * in_tile).sum())  # of those the ones that a word of bits is read for

    def walk(launch: dict[str, int]) -> _Moved:
        """The parts of tiles: their tokens, and the images that each visits."""
        in_part = _tokens_of_parts(lists, launch["BLOCK_M"])
        visits, blocks = int((seen[..., None] * (in_part > 0)).sum()), -(-image_length // launch["BLOCK_N"])
        listed = (
            in_part.numel() * (4 * launch["BLOCK_M"] + 8) + 4 * blocks * visits + 8 * blocks * masked_visits
        )
        return _Moved(2 * image_length * row_bytes * visits, listed)

    launch = _launch(FORWARD_SEVERAL if several else FORWARD, query)
    operands, listed = walk(launch)
    forward = _Moved(operands + looking * row_bytes + maps + 8 * batch * tokens, listed)

    launch = _launch(QUERY_SEVERAL if several else QUERY, query)
    operands, listed = walk(launch)
    # Queries and gradients, and out where it is needed.
    maps_read = 3 if several or image_length > launch["BLOCK_N"] else 2
    by_query = _Moved(operands + looking * (maps_read * row_bytes + 12) + maps, listed)

    launch = _key_value_launch(query, image_length)
    step, blocks, pairs = launch["BLOCK_M"], -(-image_length // launch["BLOCK_N"]), batch * lists.images
    tiles_of_image = lists.image_counts[..., 1].long()
    shares = -(-tiles_of_image // pieces)
    working = sum(int(((piece * shares) < tiles_of_image).sum()) for piece in range(pieces))
    # With one image a token the last tile of an image is walked only as far as it has tokens.
    steps = tile // step if several else (_tokens_of_parts(lists, step) > 0).sum(-1)
    walked = int((seen * steps).sum())
    listed = 8 * pieces * pairs + 4 * walked * (1 + step) + 8 * masked_visits
    if not several and tile > step:
        listed += 4 * (pieces * pairs + tile * working)
    written = 2 * (4 if pieces > 1 else query.element_size()) * pieces * pairs * image_length * width
    by_key = _Moved(
        blocks * token_visits * (2 * row_bytes + 12) + 2 * image_length * row_bytes * working + written,
        blocks * listed,
    )
    return {"forward": forward}, {"backward_query": by_query, "backward_key_value": by_key}


def _tokens_of_parts(lists: ImageLists, rows: int) -> torch.Tensor:
    """How many tokens each part of ``rows`` rows of each tile has, [B, M, parts]."""
    return (lists.rows.unflatten(2, (lists.rows.shape[2] // rows, rows)) >= 0).sum(-1)
