"""Triton kernels of gated cross-attention: forward, query gradient, key and value gradients.

A program of the forward and of the query-gradient kernel owns one tile of R tokens of one head and walks the
images that the tile looks at; a program of the key-value kernel owns BLOCK_N keys of one image and walks the
tiles that look at it. Softmax is in base 2. Nothing is accumulated across programs, so repeated runs are
bitwise equal; where the key-value programs are too few to fill the device the tiles of an image are dealt to
``PIECES`` programs, whose float32 partial sums a last kernel adds in a fixed order.

Bytes moved, exactly (e bytes an element, BH = B * H; a tile is *used* if it has a token, *seeing* if an image):

    t  tokens                                     s  tokens in seeing tiles
    V  pairs (tile, image) visited                P  the partial ones among them; p  tokens of their tiles, summed
    M  tiles, used or not                         U  keys L of images looked at, summed over the batch
    X  keys L of every image, N * L * B           m  blocks of keys, ceil(L / BLOCK_N)

    forward      BH/B * [ M (4 R + 8) + e D s + V m (4 + 8 [p / V]) ... ]

See ``traffic`` for the closed forms as code; the tests compare them with the interpreter's counts.

Legend: M rows of a tile (R), N keys of a block, D head dim padded to a power of two; names as in
``cross_attention``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._arch import architecture, multiprocessors
from .image_lists import ImageLists

LOG2_E = 1.4426950408889634

# Keyed by architecture, then kernel. Chosen so that no target spills and every product is a tensor-core one.
LAUNCH = {
    "sm_80": {
        "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "query": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    },
    "sm_90": {
        "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "query": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    },
    "sm_100": {
        "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "query": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        "key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    },
    "gfx942": {
        "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "query": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    },
    "interpret": {
        "forward": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "query": {"BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "key_value": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    },
}


@triton.jit
def _load_rows(base, row, stride, present, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """base[row] as [rows, BLOCK_D], zero where ``present`` is false or beyond WIDTH."""
    column = tl.arange(0, BLOCK_D)
    mask = present[:, None]
    if WIDTH < BLOCK_D:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, row, stride, tile, present, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = present[:, None]
    if WIDTH < BLOCK_D:
        mask = mask & (column < WIDTH)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _sees(words, token, present, image, WORDS: tl.constexpr):
    """Whether each token of a tile sees ``image``; ``words`` are those of the batch row."""
    word = tl.load(words + token.to(tl.int64) * WORDS + image // 64, mask=present, other=0)
    return ((word >> (image % 64).to(tl.int64)) & 1) != 0


@triton.jit
def _forward_step(
    step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, token, present, scale_log2,
    MASKED: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    image = tl.load(images + step // BLOCKS)
    place = (step % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(key, row, k_n, inside, WIDTH, BLOCK_D)  # [N, D]
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
    if LENGTH % BLOCK_N:
        score = tl.where(inside[None, :], score, float("-inf"))
    if MASKED:
        score = tl.where(_sees(words, token, present, image, WORDS)[:, None], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    shift = new_peak
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(score - shift[:, None])
    kept = tl.exp2(peak - shift)
    total = total * kept + tl.sum(weight, 1)
    v = _load_rows(value, row, v_n, inside, WIDTH, BLOCK_D)  # [N, D]
    accumulated = accumulated * kept[:, None]
    accumulated = tl.dot(weight.to(v.dtype), v, accumulated, input_precision=PRECISION)
    return accumulated, new_peak, total


@triton.jit
def gated_cross_attention_forward_kernel(
    query, key, value, out, lse, words, rows, tile_images, tile_counts,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, heads, tokens, tiles, scale_log2,
    LISTED: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    slot = batch * tiles + tile
    full, seen = tl.load(tile_counts + slot * 2), tl.load(tile_counts + slot * 2 + 1)
    token = tl.load(rows + slot * BLOCK_M + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    q = _load_rows(query + batch * q_b + head * q_h, token, q_t, present & (seen > 0), WIDTH, BLOCK_D)
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    words += batch * tokens * WORDS
    images = tile_images + slot * LISTED

    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    for step in range(0, full * BLOCKS):
        accumulated, peak, total = _forward_step(
            step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, token, present, scale_log2,
            False, WORDS, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if WORDS > 0:
        for step in range(full * BLOCKS, seen * BLOCKS):
            accumulated, peak, total = _forward_step(
                step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, token, present,
                scale_log2, True, WORDS, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip

    looked = total > 0.0
    accumulated = accumulated / tl.where(looked, total, 1.0)[:, None]
    lse_tile = tl.where(looked, peak + tl.log2(tl.where(looked, total, 1.0)), float("inf"))
    at = batch_head * tokens
    _store_rows(out + at * WIDTH, token, WIDTH, accumulated, present, WIDTH, BLOCK_D)
    tl.store(lse + at + token, lse_tile, mask=present)


@triton.jit
def _query_step(
    step, accumulated, q, g, lse, delta, key, value, k_n, v_n, images, words, token, present, scale_log2,
    MASKED: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    image = tl.load(images + step // BLOCKS)
    place = (step % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(key, row, k_n, inside, WIDTH, BLOCK_D)  # [N, D]
    v = _load_rows(value, row, v_n, inside, WIDTH, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
    weight = tl.exp2(score - lse[:, None])
    # Keys beyond the image need no mask: their k is zero, and so is what they add to the product below.
    if MASKED:
        weight = tl.where(_sees(words, token, present, image, WORDS)[:, None], weight, 0.0)
    d_weight = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    d_score = weight * (d_weight - delta[:, None])
    return tl.dot(d_score.to(k.dtype), k, accumulated, input_precision=PRECISION)


@triton.jit
def gated_cross_attention_backward_query_kernel(
    grad, query, key, value, out, lse, delta, d_query, words, rows, tile_images, tile_counts,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, heads, tokens, tiles, scale, scale_log2,
    LISTED: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    slot = batch * tiles + tile
    full, seen = tl.load(tile_counts + slot * 2), tl.load(tile_counts + slot * 2 + 1)
    token = tl.load(rows + slot * BLOCK_M + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    looking = present & (seen > 0)
    at = batch_head * tokens
    q = _load_rows(query + batch * q_b + head * q_h, token, q_t, looking, WIDTH, BLOCK_D)
    g = _load_rows(grad + batch * g_b + head * g_h, token, g_t, looking, WIDTH, BLOCK_D)
    o = _load_rows(out + at * WIDTH, token, WIDTH, looking, WIDTH, BLOCK_D)
    delta_tile = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)  # [M]
    tl.store(delta + at + token, delta_tile, mask=looking)
    lse_tile = tl.load(lse + at + token, mask=looking, other=0.0)
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    words += batch * tokens * WORDS
    images = tile_images + slot * LISTED

    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    for step in range(0, full * BLOCKS):
        accumulated = _query_step(
            step, accumulated, q, g, lse_tile, delta_tile, key, value, k_n, v_n, images, words, token, present,
            scale_log2, False, WORDS, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if WORDS > 0:
        for step in range(full * BLOCKS, seen * BLOCKS):
            accumulated = _query_step(
                step, accumulated, q, g, lse_tile, delta_tile, key, value, k_n, v_n, images, words, token,
                present, scale_log2, True, WORDS, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
    _store_rows(d_query + at * WIDTH, token, WIDTH, accumulated * scale, present, WIDTH, BLOCK_D)


@triton.jit
def _key_value_step(
    step, d_k, d_v, k, v, grad, query, lse, delta, g_t, q_t, rows, image_tiles, words, image, scale_log2,
    MASKED: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    first = tl.load(image_tiles + step // CHUNKS) * TILE + (step % CHUNKS) * BLOCK_M
    token = tl.load(rows + first + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    q = _load_rows(query, token, q_t, present, WIDTH, BLOCK_D)  # [M, D]
    g = _load_rows(grad, token, g_t, present, WIDTH, BLOCK_D)
    lse_tile = tl.load(lse + token, mask=present, other=0.0)
    delta_tile = tl.load(delta + token, mask=present, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [N, M]
    # Absent rows have zero q and g, so they add nothing; keys beyond the image are never stored.
    weight = tl.exp2(score - lse_tile[None, :])
    if MASKED:
        weight = tl.where(_sees(words, token, present, image, WORDS)[None, :], weight, 0.0)
    d_v = tl.dot(weight.to(g.dtype), g, d_v, input_precision=PRECISION)
    d_weight = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    d_score = weight * (d_weight - delta_tile[None, :])
    d_k = tl.dot(d_score.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit
def gated_cross_attention_backward_key_value_kernel(
    grad, query, key, value, lse, delta, d_key, d_value, words, rows, image_tiles, image_counts,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, heads, tokens, tiles, images, batch_heads, scale,
    scale_log2,
    WORDS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    block = tl.program_id(0) % BLOCKS
    image = (tl.program_id(0) // BLOCKS) % images
    piece = (tl.program_id(0) // (BLOCKS * images)) % PIECES
    batch_head = (tl.program_id(0) // (BLOCKS * images * PIECES)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    pair = batch * images + image
    full, seen = tl.load(image_counts + pair * 2), tl.load(image_counts + pair * 2 + 1)
    share = (seen + PIECES - 1) // PIECES
    first = piece * share
    last = tl.minimum(first + share, seen)

    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(
        key + batch * k_b + head * k_h, row, k_n, inside & (first < last), WIDTH, BLOCK_D
    )  # [N, D]
    v = _load_rows(value + batch * v_b + head * v_h, row, v_n, inside & (first < last), WIDTH, BLOCK_D)
    grad += batch * g_b + head * g_h
    query += batch * q_b + head * q_h
    lse += batch_head * tokens
    delta += batch_head * tokens
    words += batch * tokens * WORDS
    rows += batch * tiles * TILE
    image_tiles += pair * tiles

    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(first * CHUNKS, tl.minimum(full, last) * CHUNKS):
        d_k, d_v = _key_value_step(
            step, d_k, d_v, k, v, grad, query, lse, delta, g_t, q_t, rows, image_tiles, words, image,
            scale_log2, False, WORDS, WIDTH, BLOCK_D, TILE, BLOCK_M, PRECISION,
        )  # fmt: skip
    if WORDS > 0:
        for step in range(tl.maximum(full, first) * CHUNKS, last * CHUNKS):
            d_k, d_v = _key_value_step(
                step, d_k, d_v, k, v, grad, query, lse, delta, g_t, q_t, rows, image_tiles, words, image,
                scale_log2, True, WORDS, WIDTH, BLOCK_D, TILE, BLOCK_M, PRECISION,
            )  # fmt: skip
    at = (piece * batch_heads + batch_head) * images * LENGTH * WIDTH
    _store_rows(d_key + at, row, WIDTH, d_k * scale, inside, WIDTH, BLOCK_D)
    _store_rows(d_value + at, row, WIDTH, d_v, inside, WIDTH, BLOCK_D)


@triton.jit
def gated_cross_attention_backward_sum_kernel(
    parts, d_key_value, size, PIECES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the float32 partial sums [PIECES, size] in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(PIECES):
        total += tl.load(parts + piece * size + at, mask=at < size, other=0.0)
    tl.store(d_key_value + at, total.to(d_key_value.dtype.element_ty), mask=at < size)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: ImageLists,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, H, T, D] and the base-2 log-sum-exp of the scores [B, H, T] (+inf: no image)."""
    batch, heads, tokens, width = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    query, key, value = _unit_columns(query), _unit_columns(key), _unit_columns(value)
    tiles, tile = lists.rows.shape[1:]
    gated_cross_attention_forward_kernel[(tiles * batch * heads,)](
        query, key, value, out, lse, lists.mask, lists.rows, lists.tile_images, lists.tile_counts,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], heads, tokens, tiles, scale * LOG2_E,
        LISTED=lists.tile_images.shape[2], **_constants(query, lists, image_length), BLOCK_M=tile,
        **LAUNCH[architecture(query)]["forward"],
    )  # fmt: skip
    return out, lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lists: ImageLists,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query [B, H, T, D], key and value [B, H, S, D]."""
    batch, heads, tokens, width = query.shape
    d_query = query.new_empty(query.shape)
    if query.numel() == 0:
        return d_query, key.new_zeros(key.shape), value.new_zeros(value.shape)
    grad, query, key, value = (_unit_columns(tensor) for tensor in (grad, query, key, value))
    delta = torch.empty_like(lse)
    tiles, tile = lists.rows.shape[1:]
    launch = LAUNCH[architecture(query)]
    constants = _constants(query, lists, image_length)
    strides = [stride for tensor in (grad, query, key, value) for stride in tensor.stride()[:3]]
    gated_cross_attention_backward_query_kernel[(tiles * batch * heads,)](
        grad, query, key, value, out, lse, delta, d_query, lists.mask, lists.rows, lists.tile_images,
        lists.tile_counts, *strides, heads, tokens, tiles, scale, scale * LOG2_E,
        LISTED=lists.tile_images.shape[2], **constants, BLOCK_M=tile, **launch["query"],
    )  # fmt: skip

    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    if key.numel() == 0:
        return d_query, *grads
    programs = batch * heads * lists.images * -(-image_length // launch["key_value"]["BLOCK_N"])
    pieces = _pieces(programs, tiles, multiprocessors(query))
    parts = grads if pieces == 1 else query.new_empty((2, pieces, *key.shape), dtype=torch.float32)
    gated_cross_attention_backward_key_value_kernel[(programs * pieces,)](
        grad, query, key, value, lse, delta, parts[0], parts[1], lists.mask, lists.rows, lists.image_tiles,
        lists.image_counts, *strides, heads, tokens, tiles, lists.images, batch * heads, scale, scale * LOG2_E,
        **constants, TILE=tile, PIECES=pieces, **launch["key_value"],
    )  # fmt: skip
    if pieces > 1:
        for part, whole in zip(parts, grads, strict=True):
            gated_cross_attention_backward_sum_kernel[(triton.cdiv(whole.numel(), 1024),)](
                part, whole, whole.numel(), PIECES=pieces, BLOCK=1024, num_warps=4
            )
    return d_query, *grads


def _pieces(programs: int, tiles: int, processors: int) -> int:
    """How many programs share the tiles of an image: a power of two, 1 if the device is busy without."""
    pieces = 1
    while programs * pieces < 2 * processors and pieces * 2 <= min(tiles, 16):
        pieces *= 2
    return pieces


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


def _unit_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any strides but the last, which must be 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
