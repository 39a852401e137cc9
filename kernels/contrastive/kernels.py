"""Triton kernels of the contrastive losses: log-sum-exps of both directions, and the gradient of one side.

Names: R rows and C columns of a tile of similarities S, D channels. ``KIND`` says what the positives W are
(``torch_path.Positives``): 0 none, 1 own, 2 labels, 3 targets. With 1, row i and column j belong together
where ``i // ROW_KEYS == j // COLUMN_KEYS``; with 2, where any of the ROW_KEYS labels of i equals any of the
COLUMN_KEYS labels of j, weighed by the text's ``label_weight`` (texts stand on the rows if TEXT_ROWS).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(pointer, rows, limit, stride, channels, D, EVEN: tl.constexpr, EVEN_D: tl.constexpr):
    """[R, BLOCK_D] of a matrix whose rows lie ``stride`` apart; zeros outside."""
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    if EVEN and EVEN_D:
        return tl.load(pointers)
    if EVEN_D:
        return tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    return tl.load(pointers, mask=(rows < limit)[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def _similarity(
    row_pointer, column_pointer, row_tile, column_tile, rows, columns, R, C, row_stride, column_stride, D,
    BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr, EVEN_R: tl.constexpr, EVEN_C: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """rows times columns transposed, [BLOCK_R, BLOCK_C] in float32; the tiles are used if they hold all of D."""
    if D_BLOCKS == 1:
        return tl.dot(row_tile, tl.trans(column_tile), input_precision=PRECISION)
    tile = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for block in range(D_BLOCKS):
        channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
        a = _load_tile(row_pointer, rows, R, row_stride, channels, D, EVEN_R, EVEN_D)
        b = _load_tile(column_pointer, columns, C, column_stride, channels, D, EVEN_C, EVEN_D)
        tile = tl.dot(a, tl.trans(b), tile, input_precision=PRECISION)
    return tile


@triton.jit
def _weights(
    rows, columns, R, C, row_labels, column_labels, label_weight, targets, stride_target_r, stride_target_c,
    KIND: tl.constexpr, ROW_KEYS: tl.constexpr, COLUMN_KEYS: tl.constexpr, TEXT_ROWS: tl.constexpr,
):  # fmt: skip
    """The tile of W, [BLOCK_R, BLOCK_C] in float32."""
    row_ok, column_ok = rows < R, columns < C
    if KIND == 1:
        return tl.where((rows // ROW_KEYS)[:, None] == (columns // COLUMN_KEYS)[None, :], 1.0, 0.0)
    if KIND == 3:
        pointers = (
            targets
            + rows.to(tl.int64)[:, None] * stride_target_r
            + columns.to(tl.int64)[None, :] * stride_target_c
        )
        return tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    same = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for r in tl.static_range(ROW_KEYS):
        row_label = tl.load(row_labels + rows.to(tl.int64) * ROW_KEYS + r, mask=row_ok, other=0)
        for c in tl.static_range(COLUMN_KEYS):
            column_label = tl.load(
                column_labels + columns.to(tl.int64) * COLUMN_KEYS + c, mask=column_ok, other=0
            )
            same += tl.where(row_label[:, None] == column_label[None, :], 1.0, 0.0)
    if TEXT_ROWS:
        return same * tl.load(label_weight + rows, mask=row_ok, other=0.0)[:, None]
    return same * tl.load(label_weight + columns, mask=column_ok, other=0.0)[None, :]


@triton.jit(do_not_specialize=["M", "N", "first_row", "columns_per_split"])
def contrastive_forward_kernel(
    image, text, scale, row_labels, column_labels, label_weight, targets,
    row_part, column_part, positive_part,
    M, N, D, first_row, columns_per_split, stride_image, stride_text, stride_target_m, stride_target_n,
    KIND: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows against one span of columns: the rows' softmax sums over the span, the columns' over the block.

    Grid (row blocks, spans). row_part [2, spans, M], column_part [2, row blocks, N]: the largest logit in base 2, and
    the sum of the exponentials relative to it; positive_part [spans, M], in base 2 too, or [2, spans, M]: where float32
    features have several positives, logits rounded to 8 bits, whose sum is exact, and what the rounding left.
    """
    SPLIT: tl.constexpr = KEYS > 1 and image.dtype.element_ty == tl.float32
    block, span = tl.program_id(0), tl.program_id(1)
    row_totals = row_part + tl.num_programs(1).to(tl.int64) * M
    column_totals = column_part + tl.num_programs(0).to(tl.int64) * N
    rows = first_row + block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    row_ok = rows < M
    to_base_2 = tl.load(scale) * LOG2E
    row_tile = _load_tile(image, rows, M, stride_image, channels, D, EVEN_M, EVEN_D)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    positive = tl.zeros((BLOCK_M,), dtype=tl.float32)
    remainder = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = span * columns_per_split
    for start in range(first, min(first + columns_per_split, N), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column_ok = columns < N
        column_tile = row_tile
        if D_BLOCKS == 1:
            column_tile = _load_tile(text, columns, N, stride_text, channels, D, EVEN_N, EVEN_D)
        tile = _similarity(
            image, text, row_tile, column_tile, rows, columns, M, N, stride_image, stride_text, D,
            BLOCK_D, D_BLOCKS, EVEN_M, EVEN_N, EVEN_D, PRECISION,
        )  # fmt: skip
        tile = tile * to_base_2
        if KIND > 0:
            weight = _weights(
                rows, columns, M, N, row_labels, column_labels, label_weight, targets, stride_target_m, stride_target_n,
                KIND, KEYS if KIND == 2 else 1, KEYS if KIND == 1 else 1, False,
            )  # fmt: skip
            logit = tile
            if SPLIT:
                logit = tile.to(tl.bfloat16).to(tl.float32)
                remainder += tl.sum(tl.where(column_ok[None, :], weight * (tile - logit), 0.0), axis=1)
            positive += tl.sum(tl.where(column_ok[None, :], weight * logit, 0.0), axis=1)
        by_column = tile if EVEN_M else tl.where(row_ok[:, None], tile, float("-inf"))
        column_top = tl.max(by_column, axis=0)
        column_total = tl.sum(tl.exp2(by_column - column_top[None, :]), axis=0)
        tl.store(column_part + block.to(tl.int64) * N + columns, column_top, mask=column_ok)
        tl.store(column_totals + block.to(tl.int64) * N + columns, column_total, mask=column_ok)
        by_row = tile if EVEN_N else tl.where(column_ok[None, :], tile, float("-inf"))
        new_top = tl.maximum(top, tl.max(by_row, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(by_row - new_top[:, None]), axis=1)
        top = new_top
    tl.store(row_part + span.to(tl.int64) * M + rows, top, mask=row_ok)
    tl.store(row_totals + span.to(tl.int64) * M + rows, total, mask=row_ok)
    if KIND > 0:
        tl.store(positive_part + span.to(tl.int64) * M + rows, positive, mask=row_ok)
        if SPLIT:
            rest = positive_part + tl.num_programs(1).to(tl.int64) * M
            tl.store(rest + span.to(tl.int64) * M + rows, remainder, mask=row_ok)


@triton.jit(do_not_specialize=["P"])
def contrastive_merge_forward_kernel(
    parts, whole, P, L, stride, HAS_WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Merge the peaks and sums of parts [2, P, L], after those of ``whole`` [2, L] if HAS_WHOLE, in order.

    ``stride`` is P * L, from a peak to its sum.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < L
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_WHOLE:
        top = tl.load(whole + at, mask=ok, other=0.0)
        total = tl.load(whole + L + at, mask=ok, other=0.0)
    pointers = parts + at
    for _ in range(P):
        value = tl.load(pointers, mask=ok, other=0.0)
        part = tl.load(pointers + stride, mask=ok, other=0.0)
        new_top = tl.maximum(top, value)
        total = total * tl.exp2(top - new_top) + part * tl.exp2(value - new_top)
        top = new_top
        pointers += L
    tl.store(whole + at, top, mask=ok)
    tl.store(whole + L + at, total, mask=ok)


@triton.jit(do_not_specialize=["R", "C", "columns_per_split"])
def contrastive_backward_gradient_kernel(
    row_side, column_side, scalars, row_peak, column_peak, row_weight, column_weight,
    row_labels, column_labels, label_weight, targets, grad_part, scale_part,
    R, C, D, columns_per_split, stride_row, stride_column, stride_target_r, stride_target_c,
    KIND: tl.constexpr, ROW_KEYS: tl.constexpr, COLUMN_KEYS: tl.constexpr, TEXT_ROWS: tl.constexpr,
    WITH_SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, D_BLOCKS: tl.constexpr,
    EVEN_R: tl.constexpr, EVEN_C: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of rows from one span of columns.

    The softmax weight of an element is exp2(logit in base 2 - peak) * weight, for its row and for its column.
    ``scalars`` [3]: the scale, the weight of the positives and what the gradient is multiplied by in the end.
    Grid (row blocks, spans, D_BLOCKS). grad_part [spans, R, D]; scale_part [spans, R].
    """
    block, span, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = part * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok = rows < R
    to_base_2 = tl.load(scalars) * LOG2E
    positive_weight = tl.load(scalars + 1)
    row_tile = _load_tile(row_side, rows, R, stride_row, channels, D, EVEN_R, EVEN_D)
    row_shift = tl.load(row_peak + rows, mask=row_ok, other=0.0)
    row_share = tl.load(row_weight + rows, mask=row_ok, other=0.0)
    gradient = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    dots = tl.zeros((BLOCK_R,), dtype=tl.float32)
    first = span * columns_per_split
    for start in range(first, min(first + columns_per_split, C), BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        column_ok = columns < C
        column_tile = _load_tile(column_side, columns, C, stride_column, channels, D, EVEN_C, EVEN_D)
        tile = _similarity(
            row_side, column_side, row_tile, column_tile, rows, columns, R, C, stride_row, stride_column, D,
            BLOCK_D, D_BLOCKS, EVEN_R, EVEN_C, EVEN_D, PRECISION,
        )  # fmt: skip
        column_shift = tl.load(column_peak + columns, mask=column_ok, other=0.0)
        column_share = tl.load(column_weight + columns, mask=column_ok, other=0.0)
        weight = tl.exp2(tile * to_base_2 - row_shift[:, None]) * row_share[:, None]
        weight += tl.exp2(tile * to_base_2 - column_shift[None, :]) * column_share[None, :]
        if KIND > 0:
            positives = _weights(
                rows, columns, R, C, row_labels, column_labels, label_weight, targets, stride_target_r, stride_target_c,
                KIND, ROW_KEYS, COLUMN_KEYS, TEXT_ROWS,
            )  # fmt: skip
            weight -= positive_weight * positives
        if not (EVEN_R and EVEN_C):
            weight = tl.where(row_ok[:, None] & column_ok[None, :], weight, 0.0)
        if WITH_SCALE:
            dots += tl.sum(weight * tile, axis=1)
        gradient = tl.dot(weight.to(column_tile.dtype), column_tile, gradient, input_precision=PRECISION)
    multiplier = tl.load(scalars + 2)
    wide_rows = rows.to(tl.int64)
    pointers = grad_part + (span.to(tl.int64) * R + wide_rows)[:, None] * D + channels[None, :]
    tile = (gradient * multiplier).to(grad_part.dtype.element_ty)
    if EVEN_R and EVEN_D:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=row_ok[:, None] & (channels < D)[None, :])
    if WITH_SCALE and part == 0:
        tl.store(scale_part + span.to(tl.int64) * R + wide_rows, dots, mask=row_ok)
