"""Triton kernels of gated cross-attention where a token sees one image whose keys fit a block.

Then a row of scores is at hand whole, so its softmax is not accumulated, and one backward kernel makes all three
gradients: each token belongs to one image, so no other program adds to its query gradient. A program loads the
keys and values of its image once and walks that image's tokens in steps of BLOCK_M, the last of them in a step of
TAIL if that holds them. Tokens stand in columns: the matrix instructions want at least 64 rows, which the keys
fill, and as few as 16 columns, so little is computed for tokens that are not there.

Offsets, softmax base and legend as in ``kernels``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import VARYING, _load_rows, _store_rows, _tokens_in


@triton.jit
def _forward_step(
    start, k, v, query, out, peaks, inverses, q_t, rows, inside, scale_log2,
    STEP: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.load(rows + start + tl.arange(0, STEP))  # [M]
    present = token >= 0
    q = _load_rows(query, token, q_t, present, WIDTH, BLOCK_D)  # [M, D]
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [N, M]
    if LENGTH < BLOCK_N:
        score = tl.where(inside[:, None], score, float("-inf"))
    peak = tl.max(score, 0)
    weight = tl.exp2(score - peak[None, :])
    inverse = 1.0 / tl.sum(weight, 0)
    result = tl.dot(tl.trans(v), weight.to(v.dtype), input_precision=PRECISION) * inverse[None, :]  # [D, M]
    _store_rows(out, token, WIDTH, tl.trans(result), present, WIDTH, BLOCK_D)
    # The peak and the inverse of the sum apart: their logarithm would cost float32 gradients a digit.
    tl.store(peaks + token, peak, mask=present)
    tl.store(inverses + token, inverse, mask=present)


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_one_forward_kernel(
    query, key, value, out, statistics, rows, tile_images, tile_counts,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, batch_heads, heads, tokens, tiles, scale_log2,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of tokens, all of one image or of none; grid [batch, head, tile]."""
    tile = tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    slot = batch * tiles + tile
    seen, image = tl.load(tile_counts + slot * 2), tl.load(tile_images + slot)
    rows += slot * TILE
    count = _tokens_in(rows, True, TILE)
    place = tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(key + batch * k_b + head * k_h, row, k_n, inside & (seen > 0), WIDTH, BLOCK_D)  # [N, D]
    v = _load_rows(value + batch * v_b + head * v_h, row, v_n, inside & (seen > 0), WIDTH, BLOCK_D)
    query += batch * q_b + head * q_h
    out += batch_head * tokens * WIDTH
    peaks = statistics + batch_head * tokens
    inverses = peaks + batch_heads * tokens

    SPARE: tl.constexpr = BLOCK_M - 1 - TAIL % BLOCK_M
    main = seen * ((count + SPARE) // BLOCK_M) * BLOCK_M
    for start in range(0, main, BLOCK_M):
        _forward_step(
            start, k, v, query, out, peaks, inverses, q_t, rows, inside, scale_log2,
            BLOCK_M, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if TAIL < BLOCK_M:
        for start in range(main, seen * count, TAIL):
            _forward_step(
                start, k, v, query, out, peaks, inverses, q_t, rows, inside, scale_log2,
                TAIL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
    for start in range(0, (1 - seen) * count, BLOCK_M):
        token = tl.load(rows + start + tl.arange(0, BLOCK_M))
        nothing = tl.zeros([BLOCK_M], tl.float32)
        _store_rows(out, token, WIDTH, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), token >= 0, WIDTH, BLOCK_D)
        tl.store(peaks + token, nothing, mask=token >= 0)
        tl.store(inverses + token, nothing, mask=token >= 0)


@triton.jit
def _backward_step(
    start, d_k, d_v, k, v, grad, query, peaks, inverses, d_query, g_t, q_t, rows, inside, scale, scale_log2,
    STEP: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.load(rows + start + tl.arange(0, STEP))  # [M]
    present = token >= 0
    q = _load_rows(query, token, q_t, present, WIDTH, BLOCK_D)  # [M, D]
    g = _load_rows(grad, token, g_t, present, WIDTH, BLOCK_D)
    peak = tl.load(peaks + token, mask=present, other=0.0)
    inverse = tl.load(inverses + token, mask=present, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [N, M]
    weight = tl.exp2(score - peak[None, :]) * inverse[None, :]
    if LENGTH < BLOCK_N:  # score 0 may be far above the peak
        weight = tl.where(inside[:, None], weight, 0.0)
    # Absent tokens have zero q and g, so they add nothing.
    d_v = tl.dot(weight.to(g.dtype), g, d_v, input_precision=PRECISION)  # [N, D]
    d_weight = tl.dot(v, tl.trans(g), input_precision=PRECISION)  # [N, M]
    delta = tl.sum(weight * d_weight, 0)
    d_score = weight * (d_weight - delta[None, :])
    if LENGTH == 1:  # a lone key has weight 1 whatever its score; not almost
        d_score = tl.zeros_like(d_score)
    d_score = d_score.to(q.dtype)
    d_k = tl.dot(d_score, q, d_k, input_precision=PRECISION)
    d_q = tl.dot(tl.trans(k), d_score, input_precision=PRECISION) * scale  # [D, M]
    _store_rows(d_query, token, WIDTH, tl.trans(d_q), present, WIDTH, BLOCK_D)
    return d_k, d_v


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_one_backward_kernel(
    grad, query, key, value, statistics, d_query, d_key, d_value, rows, image_tiles, image_counts,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, batch_heads, heads, tokens, tiles, images,
    pieces, scale, scale_log2,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One piece of the tokens of one image, or of those without; grid [batch, head, piece, image or none]."""
    image = tl.program_id(0) % (images + 1)
    piece = (tl.program_id(0) // (images + 1)) % pieces
    batch_head = (tl.program_id(0) // ((images + 1) * pieces)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    looked = image < images
    pair = batch * images + tl.minimum(image, images - 1)
    # Tiles stand in the order of the images; those after the last image's are of tokens without an image.
    begin, seen = tl.load(image_tiles + pair * tiles), tl.load(image_counts + pair * 2)
    begin, seen = tl.where(looked, begin, begin + seen), tl.where(looked, seen, tiles - begin - seen)
    share = (seen + pieces - 1) // pieces
    first = tl.minimum(piece * share, seen)
    last = tl.minimum(first + share, seen)
    rows += (batch * tiles + begin + first) * TILE
    # Every tile of an image but its last one is full.
    before = tl.maximum(last - first - 1, 0) * TILE
    count = before + _tokens_in(rows + before, last > first, TILE)
    work = tl.where(looked, count, 0)

    place = tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(key + batch * k_b + head * k_h, row, k_n, inside & (work > 0), WIDTH, BLOCK_D)  # [N, D]
    v = _load_rows(value + batch * v_b + head * v_h, row, v_n, inside & (work > 0), WIDTH, BLOCK_D)
    grad += batch * g_b + head * g_h
    query += batch * q_b + head * q_h
    peaks = statistics + batch_head * tokens
    inverses = peaks + batch_heads * tokens
    d_query += batch_head * tokens * WIDTH

    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    SPARE: tl.constexpr = BLOCK_M - 1 - TAIL % BLOCK_M
    main = (work + SPARE) // BLOCK_M * BLOCK_M
    for start in range(0, main, BLOCK_M):
        d_k, d_v = _backward_step(
            start, d_k, d_v, k, v, grad, query, peaks, inverses, d_query, g_t, q_t, rows, inside, scale, scale_log2,
            BLOCK_M, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if TAIL < BLOCK_M:
        for start in range(main, work, TAIL):
            d_k, d_v = _backward_step(
                start, d_k, d_v, k, v, grad, query, peaks, inverses, d_query, g_t, q_t, rows, inside, scale,
                scale_log2, TAIL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
    at = (piece * batch_heads + batch_head) * images * LENGTH * WIDTH
    _store_rows(d_key + at, row, WIDTH, d_k * scale, inside & looked, WIDTH, BLOCK_D)
    _store_rows(d_value + at, row, WIDTH, d_v, inside & looked, WIDTH, BLOCK_D)
    # Among tiles without an image are unused ones, so they are walked whole.
    for start in range(0, tl.where(looked, 0, (last - first) * TILE), BLOCK_M):
        token = tl.load(rows + start + tl.arange(0, BLOCK_M))
        zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        _store_rows(d_query, token, WIDTH, zeros, token >= 0, WIDTH, BLOCK_D)
