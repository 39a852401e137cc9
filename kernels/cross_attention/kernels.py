"""The Triton kernels of gated cross-attention; ``launch`` launches them and says what they cost.

Every kernel addresses rows through the token numbers of its tile, so tokens may be in any order. Offsets are
64-bit; only the last stride must be 1. Operands go to ``tl.dot`` as loaded, everything else is float32. Softmax is
in base 2: ``scale_log2`` is the scale times log2(e).

Legend: M rows of a tile or of a part of one, N keys of a block, D head dim padded to a power of two; TILE rows in
a tile (walked in CHUNKS parts of BLOCK_M rows), LENGTH keys an image, WIDTH the head dim; SEVERAL images a token, of
which 64-bit words of bits say which (else one, never masked). What differs from batch to batch is no constant, and is
not specialised: word_count words a token, listed images a tile can list, pieces, the programs that share the tiles of
an image.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = ["batch_heads", "tokens", "tiles", "images", "listed", "word_count", "pieces"]


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
def _tokens_in(rows, there, TILE: tl.constexpr):
    """How many rows of a tile are tokens, which come first; 0 if the tile is not ``there``."""
    return tl.sum((tl.load(rows + tl.arange(0, TILE), mask=there, other=-1) >= 0).to(tl.int32))


@triton.jit
def _sees(words, token, present, image, word_count):
    """Whether each token of a tile sees ``image``; ``words`` are those of the batch row."""
    word = tl.load(words + token.to(tl.int64) * word_count + image // 64, mask=present, other=0)
    return ((word >> (image % 64).to(tl.int64)) & 1) != 0


@triton.jit
def _forward_step(
    step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, word_count, token, present,
    scale_log2, MASKED: tl.constexpr, SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
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
        score = tl.where(_sees(words, token, present, image, word_count)[:, None], score, float("-inf"))
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


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_forward_kernel(
    query, key, value, out, statistics, words, rows, tile_images, tile_counts,
    q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, batch_heads, heads, tokens, tiles, listed, word_count,
    scale_log2, SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    chunk = tl.program_id(0) % CHUNKS
    tile = (tl.program_id(0) // CHUNKS) % tiles
    batch_head = (tl.program_id(0) // (CHUNKS * tiles)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    slot = batch * tiles + tile
    full, seen = tl.load(tile_counts + slot * 2), tl.load(tile_counts + slot * 2 + 1)
    token = tl.load(rows + slot * TILE + chunk * BLOCK_M + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    if CHUNKS > 1:  # this part of the tile may have no tokens
        full, seen = tl.where(tl.max(token) < 0, 0, full), tl.where(tl.max(token) < 0, 0, seen)
    q = _load_rows(query + batch * q_b + head * q_h, token, q_t, present & (seen > 0), WIDTH, BLOCK_D)
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    words += batch * tokens * word_count
    images = tile_images + slot * listed

    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    for step in range(full * BLOCKS):
        accumulated, peak, total = _forward_step(
            step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, word_count, token,
            present, scale_log2, False, SEVERAL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if SEVERAL:
        for step in range(full * BLOCKS, seen * BLOCKS):
            accumulated, peak, total = _forward_step(
                step, accumulated, peak, total, q, key, value, k_n, v_n, images, words, word_count,
                token, present, scale_log2, True, SEVERAL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip

    looked = total > 0.0
    # The peak and the inverse of the sum apart: their logarithm would cost float32 gradients a digit.
    inverse = tl.where(looked, 1.0 / tl.where(looked, total, 1.0), 0.0)
    at = batch_head * tokens
    accumulated = accumulated * inverse[:, None]
    _store_rows(out + at * WIDTH, token, WIDTH, accumulated, present, WIDTH, BLOCK_D)
    tl.store(statistics + at + token, tl.where(looked, peak, 0.0), mask=present)
    tl.store(statistics + batch_heads * tokens + at + token, inverse, mask=present)


@triton.jit
def _query_step(
    step, accumulated, q, g, peak, inverse, delta, key, value, k_n, v_n, images, words, word_count, token, present,
    scale_log2, MASKED: tl.constexpr, SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    image = tl.load(images + step // BLOCKS)
    place = (step % BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    k = _load_rows(key, row, k_n, inside, WIDTH, BLOCK_D)  # [N, D]
    v = _load_rows(value, row, v_n, inside, WIDTH, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
    weight = tl.exp2(score - peak[:, None]) * inverse[:, None]
    if LENGTH % BLOCK_N:  # score 0 may be far above the peak
        weight = tl.where(inside[None, :], weight, 0.0)
    if MASKED:
        weight = tl.where(_sees(words, token, present, image, word_count)[:, None], weight, 0.0)
    d_weight = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if not SEVERAL and LENGTH <= BLOCK_N:
        # Over the sum of the weights, which is one but for the rounding of large scores, here and in the forward pass.
        total = tl.sum(weight, 1)
        delta = tl.sum(weight * d_weight, 1) / tl.where(total > 0, total, 1.0)
    d_score = weight * (d_weight - delta[:, None])
    if not SEVERAL and LENGTH == 1:  # a lone key has weight 1 whatever its score; not almost
        d_score = tl.zeros_like(d_score)
    return tl.dot(d_score.to(k.dtype), k, accumulated, input_precision=PRECISION), delta


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_backward_query_kernel(
    grad, query, key, value, out, statistics, delta, d_query, words, rows, tile_images, tile_counts,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, batch_heads, heads, tokens, tiles, listed,
    word_count, scale, scale_log2,
    SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    chunk = tl.program_id(0) % CHUNKS
    tile = (tl.program_id(0) // CHUNKS) % tiles
    batch_head = (tl.program_id(0) // (CHUNKS * tiles)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    slot = batch * tiles + tile
    full, seen = tl.load(tile_counts + slot * 2), tl.load(tile_counts + slot * 2 + 1)
    token = tl.load(rows + slot * TILE + chunk * BLOCK_M + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    if CHUNKS > 1:  # this part of the tile may have no tokens
        full, seen = tl.where(tl.max(token) < 0, 0, full), tl.where(tl.max(token) < 0, 0, seen)
    looking = present & (seen > 0)
    at = batch_head * tokens
    q = _load_rows(query + batch * q_b + head * q_h, token, q_t, looking, WIDTH, BLOCK_D)
    g = _load_rows(grad + batch * g_b + head * g_h, token, g_t, looking, WIDTH, BLOCK_D)
    # delta, the sum of weight * d_weight over a row, equals that of grad * out. Where one step sees the whole row
    # the first is at hand, exact to the last bits, and ``out`` need not be read.
    delta_tile = tl.zeros([BLOCK_M], tl.float32)
    if SEVERAL or LENGTH > BLOCK_N:
        o = _load_rows(out + at * WIDTH, token, WIDTH, looking, WIDTH, BLOCK_D)
        delta_tile = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    peak = tl.load(statistics + at + token, mask=looking, other=0.0)
    inverse = tl.load(statistics + batch_heads * tokens + at + token, mask=looking, other=0.0)
    key += batch * k_b + head * k_h
    value += batch * v_b + head * v_h
    words += batch * tokens * word_count
    images = tile_images + slot * listed

    accumulated = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    for step in range(full * BLOCKS):
        accumulated, delta_tile = _query_step(
            step, accumulated, q, g, peak, inverse, delta_tile, key, value, k_n, v_n, images, words, word_count,
            token, present, scale_log2, False, SEVERAL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if SEVERAL:
        for step in range(full * BLOCKS, seen * BLOCKS):
            accumulated, delta_tile = _query_step(
                step, accumulated, q, g, peak, inverse, delta_tile, key, value, k_n, v_n, images, words,
                word_count, token, present, scale_log2, True, SEVERAL, LENGTH, WIDTH, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
    _store_rows(d_query + at * WIDTH, token, WIDTH, accumulated * scale, present, WIDTH, BLOCK_D)
    tl.store(delta + at + token, delta_tile, mask=looking)


@triton.jit
def _key_value_step(
    step, d_k, d_v, k, v, grad, query, peaks, inverses, delta, g_t, q_t, rows, image_tiles, words, word_count,
    image, scale_log2, MASKED: tl.constexpr, SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    first = tl.load(image_tiles + step // CHUNKS) * TILE + (step % CHUNKS) * BLOCK_M
    token = tl.load(rows + first + tl.arange(0, BLOCK_M))  # [M]
    present = token >= 0
    q = _load_rows(query, token, q_t, present, WIDTH, BLOCK_D)  # [M, D]
    g = _load_rows(grad, token, g_t, present, WIDTH, BLOCK_D)
    peak = tl.load(peaks + token, mask=present, other=0.0)
    inverse = tl.load(inverses + token, mask=present, other=0.0)
    delta_tile = tl.load(delta + token, mask=present, other=0.0)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [N, M]
    # Absent rows have zero q and g, so they add nothing; keys beyond the image are never stored.
    weight = tl.exp2(score - peak[None, :]) * inverse[None, :]
    if MASKED:
        weight = tl.where(_sees(words, token, present, image, word_count)[None, :], weight, 0.0)
    d_v = tl.dot(weight.to(g.dtype), g, d_v, input_precision=PRECISION)
    d_weight = tl.dot(v, tl.trans(g), input_precision=PRECISION)
    if not SEVERAL and k.shape[0] >= LENGTH:  # as in _query_step: of the same products as d_score
        own = tl.where((tl.arange(0, k.shape[0]) < LENGTH)[:, None], weight, 0.0)
        total = tl.sum(own, 0)
        delta_tile = tl.sum(own * d_weight, 0) / tl.where(total > 0, total, 1.0)
    d_score = weight * (d_weight - delta_tile[None, :])
    if not SEVERAL and LENGTH == 1:
        d_score = tl.zeros_like(d_score)
    d_k = tl.dot(d_score.to(q.dtype), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_backward_key_value_kernel(
    grad, query, key, value, statistics, delta, d_key, d_value, words, rows, image_tiles, image_counts,
    g_b, g_h, g_t, q_b, q_h, q_t, k_b, k_h, k_n, v_b, v_h, v_n, batch_heads, heads, tokens, tiles, images,
    pieces, word_count, scale, scale_log2,
    SEVERAL: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_N - 1) // BLOCK_N
    CHUNKS: tl.constexpr = TILE // BLOCK_M
    block = tl.program_id(0) % BLOCKS
    image = (tl.program_id(0) // BLOCKS) % images
    piece = (tl.program_id(0) // (BLOCKS * images)) % pieces
    batch_head = (tl.program_id(0) // (BLOCKS * images * pieces)).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    pair = batch * images + image
    full, seen = tl.load(image_counts + pair * 2), tl.load(image_counts + pair * 2 + 1)
    share = (seen + pieces - 1) // pieces
    first = piece * share
    last = tl.minimum(first + share, seen)

    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < LENGTH
    row = image.to(tl.int64) * LENGTH + place
    wanted = inside & (first < last)
    k = _load_rows(key + batch * k_b + head * k_h, row, k_n, wanted, WIDTH, BLOCK_D)  # [N, D]
    v = _load_rows(value + batch * v_b + head * v_h, row, v_n, wanted, WIDTH, BLOCK_D)
    grad += batch * g_b + head * g_h
    query += batch * q_b + head * q_h
    peaks = statistics + batch_head * tokens
    inverses = peaks + batch_heads * tokens
    delta += batch_head * tokens
    words += batch * tokens * word_count
    rows += batch * tiles * TILE
    image_tiles += pair * tiles

    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    stop = tl.minimum(full, last) * CHUNKS
    if not SEVERAL and CHUNKS > 1:  # the last tile of an image may have rows to spare
        tile = tl.load(image_tiles + tl.maximum(last - 1, 0))
        spare = TILE - _tokens_in(rows + tile * TILE, last > first, TILE)
        stop = tl.maximum(stop - spare // BLOCK_M, first * CHUNKS)
    for step in range(first * CHUNKS, stop):
        d_k, d_v = _key_value_step(
            step, d_k, d_v, k, v, grad, query, peaks, inverses, delta, g_t, q_t, rows, image_tiles, words,
            word_count, image, scale_log2, False, SEVERAL, LENGTH, WIDTH, BLOCK_D, TILE, BLOCK_M, PRECISION,
        )  # fmt: skip
    if SEVERAL:
        for step in range(tl.maximum(full, first) * CHUNKS, last * CHUNKS):
            d_k, d_v = _key_value_step(
                step, d_k, d_v, k, v, grad, query, peaks, inverses, delta, g_t, q_t, rows, image_tiles, words,
                word_count, image, scale_log2, True, SEVERAL, LENGTH, WIDTH, BLOCK_D, TILE, BLOCK_M, PRECISION,
            )  # fmt: skip
    at = (piece * batch_heads + batch_head) * images * LENGTH * WIDTH
    _store_rows(d_key + at, row, WIDTH, d_k * scale, inside, WIDTH, BLOCK_D)
    _store_rows(d_value + at, row, WIDTH, d_v, inside, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def gated_cross_attention_backward_sum_kernel(parts, d_key_value, size, pieces, BLOCK: tl.constexpr):
    """Add the float32 partial sums [pieces, size] in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(pieces):
        total += tl.load(parts + piece * size + at, mask=at < size, other=0.0)
    tl.store(d_key_value + at, total.to(d_key_value.dtype.element_ty), mask=at < size)
