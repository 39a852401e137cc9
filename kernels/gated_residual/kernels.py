"""The Triton kernels of the gated residual sum, alone and with the norm; ``launch`` says what they cost."""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh in float32 without libdevice; the series keeps small gates exact to the last bits."""
    square = x * x
    small = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    shrunk = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _gate(alpha, column, inside, SCALAR: tl.constexpr):
    """tanh(alpha) of some channels, or of the one alpha."""
    if SCALAR:
        loaded = tl.load(alpha)
    else:
        loaded = tl.load(alpha + column, mask=inside, other=0.0)
    return _tanh(loaded.to(tl.float32))


@triton.jit
def _taken(row_mask, row, present, MASKED: tl.constexpr):
    """Which rows exist and take the update."""
    taken = present
    if MASKED:
        taken = present & (tl.load(row_mask + row, mask=present, other=0) != 0)
    return taken


@triton.jit(do_not_specialize=["rows", "run"])
def gated_residual_forward_kernel(
    residual, update, alpha, row_mask, out, residual_stride, update_stride, rows, run,
    SCALAR: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    column = (tl.program_id(0) % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    gate = _gate(alpha, column, inside, SCALAR)
    first = (tl.program_id(0) // COLUMNS) * run
    for start in range(first, tl.minimum(first + run, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        present = row < rows
        taken = _taken(row_mask, row, present, MASKED)
        at = row[:, None] * residual_stride + column[None, :]
        r = tl.load(residual + at, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = row[:, None] * update_stride + column[None, :]
        u = tl.load(update + at, mask=taken[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = row[:, None] * WIDTH + column[None, :]
        tl.store(out + at, (r + gate * u).to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows", "run"])
def gated_residual_backward_kernel(
    grad, update, alpha, row_mask, d_update, parts, grad_stride, update_stride, rows, run,
    SCALAR: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    column = (tl.program_id(0) % COLUMNS) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    gate = _gate(alpha, column, inside, SCALAR)
    piece = tl.program_id(0) // COLUMNS
    first = piece * run
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, tl.minimum(first + run, rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R).to(tl.int64)
        present = row < rows
        taken = _taken(row_mask, row, present, MASKED)
        wanted = taken[:, None] & inside[None, :]
        # The order of these lines is part of the cost: the same sums as one offset take 4 registers more on gfx942.
        g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=wanted, other=0.0).to(
            tl.float32
        )
        at = row[:, None] * update_stride + column[None, :]
        total += g * tl.load(update + at, mask=wanted, other=0.0).to(tl.float32)
        at = row[:, None] * WIDTH + column[None, :]
        tl.store(
            d_update + at, (gate * g).to(d_update.dtype.element_ty), mask=present[:, None] & inside[None, :]
        )
    if SCALAR:
        tl.store(parts + tl.program_id(0), tl.sum(total))
    else:
        tl.store(parts + piece.to(tl.int64) * WIDTH + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "run"])
def gated_residual_rms_norm_forward_kernel(
    residual, update, alpha, row_mask, weight, out, norm, inverse_rms, residual_stride, update_stride, rows, run,
    norm_eps, SCALAR: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    gate = _gate(alpha, column, inside, SCALAR)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * run
    for index in range(first, tl.minimum(first + run, rows)):
        row = tl.cast(index, tl.int64)
        taken = inside
        if MASKED:
            taken = inside & (tl.load(row_mask + row) != 0)
        r = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(update + row * update_stride + column, mask=taken, other=0.0).to(tl.float32)
        # Norm what is stored, so that the fused form equals the sum followed by a norm.
        stored = (r + gate * u).to(out.dtype.element_ty)
        tl.store(out + row * WIDTH + column, stored, mask=inside)
        x = stored.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + norm_eps)
        tl.store(inverse_rms + row, scale)
        tl.store(norm + row * WIDTH + column, (x * scale * w).to(norm.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "run"])
def gated_residual_rms_norm_backward_kernel(
    grad_out, grad_norm, out, update, alpha, row_mask, weight, inverse_rms, d_residual, d_update, alpha_parts,
    weight_parts, grad_out_stride, grad_norm_stride, update_stride, rows, run,
    SCALAR: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    gate = _gate(alpha, column, inside, SCALAR)
    if HELD:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    piece = tl.program_id(0)
    first = piece * run
    d_alpha = tl.zeros([BLOCK_C], tl.float32)
    d_weight = tl.zeros([BLOCK_C], tl.float32)
    for index in range(first, tl.minimum(first + run, rows)):
        row = tl.cast(index, tl.int64)
        taken = inside
        if MASKED:
            taken = inside & (tl.load(row_mask + row) != 0)
        scale = tl.load(inverse_rms + row)
        x = tl.load(out + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32) * scale
        gn = tl.load(grad_norm + row * grad_norm_stride + column, mask=inside, other=0.0).to(tl.float32)
        d_weight += gn * x
        if not HELD:  # wide rows: too many registers otherwise; it stays in the cache
            w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        gn *= w
        g = tl.load(grad_out + row * grad_out_stride + column, mask=inside, other=0.0).to(tl.float32)
        g += scale * (gn - x * (tl.sum(gn * x) / WIDTH))
        tl.store(d_residual + row * WIDTH + column, g.to(d_residual.dtype.element_ty), mask=inside)
        u = tl.load(update + row * update_stride + column, mask=taken, other=0.0).to(tl.float32)
        d_alpha += g * u
        d_u = tl.where(taken, gate * g, 0.0).to(d_update.dtype.element_ty)
        tl.store(d_update + row * WIDTH + column, d_u, mask=inside)
    at = piece.to(tl.int64) * WIDTH + column
    tl.store(weight_parts + at, d_weight, mask=inside)
    if SCALAR:
        tl.store(alpha_parts + piece, tl.sum(d_alpha))
    else:
        tl.store(alpha_parts + at, d_alpha, mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def gated_residual_backward_channel_kernel(
    parts, alpha, total, pieces, GATED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Add partials [pieces, WIDTH] in order; times the slope of tanh at alpha if GATED."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < WIDTH
    added = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, pieces, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        wanted = (row < pieces)[:, None] & inside[None, :]
        added += tl.load(parts + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=wanted, other=0.0)
    result = tl.sum(added, 0)
    if GATED:
        gate = _gate(alpha, column, inside, False)
        result *= 1.0 - gate * gate
    tl.store(total + column, result.to(total.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def gated_residual_backward_scalar_kernel(parts, alpha, total, pieces, BLOCK: tl.constexpr):
    """Add partials [pieces] in order, times the slope of tanh at alpha."""
    added = tl.zeros([BLOCK], tl.float32)
    for start in range(0, pieces, BLOCK):
        at = start + tl.arange(0, BLOCK)
        added += tl.load(parts + at, mask=at < pieces, other=0.0)
    gate = _tanh(tl.load(alpha).to(tl.float32))
    tl.store(total, (tl.sum(added) * (1.0 - gate * gate)).to(total.dtype.element_ty))
