"""Triton kernels of the gated residual sum, alone and fused with the RMSNorm that follows it.

Everything is one pass over the rows. Gradients summed over rows (alpha, norm weight) are accumulated by each
program over its own run of rows and written as one float32 partial; a last kernel adds the partials in a fixed
order, so repeated runs are bitwise equal.

Bytes moved, exactly, for R rows of C elements of e bytes, R' of them taking the update, in P runs of rows; a and w are
the bytes of an element of alpha and of the norm's weight; k = ceil(C / BLOCK_C) blocks of channels (1 with the norm);
A = C numbers of alpha, or k of them for a single alpha (A' = C or 1); all as seen by a mask of one byte a row:

    gated_residual            forward   e C (2 R + R') + k R + P a A
                              backward  e C (2 R' + R) + k R + P A (a + 8) + 2 a A'
    gated_residual_rms_norm   forward   e C (3 R + R') + 5 R + P (a A + w C)
                              backward  e C (5 R + R') + 5 R + P (a A + w C + 8 A + 8 C) + 2 a A' + w C

(w C is read a row, not a run, by the last one if not HELD.) The floor, each input read once and each output written
once, is the first term of each line.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class, and launch options not at all.
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.arch import multiprocessors
from ..common.launch import on_its_device


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


BLOCK_R, BLOCK_C = 4, 1024  # 16 bytes a thread of four warps and row, for two-byte elements
_TILE = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": 4}
_CHANNELS = {"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 4}
_SCALAR = {"BLOCK": 1024, "num_warps": 4}


@on_its_device
def gated_residual(
    residual: torch.Tensor, update: torch.Tensor, alpha: torch.Tensor, row_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return residual + tanh(alpha) * update, [R, C]."""
    out = residual.new_empty(residual.shape)
    rows, width = residual.shape
    if out.numel():
        pieces, run = _runs(rows, -(-width // BLOCK_C), residual)
        gated_residual_forward_kernel[(pieces * -(-width // BLOCK_C),)](
            residual, update, alpha, row_mask, out, residual.stride(0), update.stride(0), rows, run,
            **_constants(alpha, row_mask, width), **_TILE,
        )  # fmt: skip
    return out


@on_its_device
def gated_residual_backward(
    grad: torch.Tensor, update: torch.Tensor, alpha: torch.Tensor, row_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of update [R, C] and of alpha."""
    d_update = update.new_empty(update.shape)
    rows, width = update.shape
    if d_update.numel() == 0:
        return d_update, torch.zeros_like(alpha)
    columns = -(-width // BLOCK_C)
    pieces, run = _runs(rows, columns, update)
    scalar = alpha.numel() == 1
    parts = update.new_empty((pieces, columns if scalar else width), dtype=torch.float32)
    gated_residual_backward_kernel[(pieces * columns,)](
        grad, update, alpha, row_mask, d_update, parts, grad.stride(0), update.stride(0), rows, run,
        **_constants(alpha, row_mask, width), **_TILE,
    )  # fmt: skip
    return d_update, _add_alpha(parts, alpha)


@on_its_device
def gated_residual_rms_norm(
    residual: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    row_mask: torch.Tensor | None,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum [R, C], its norm [R, C] and 1 / rms [R]."""
    out, norm = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    rows, width = residual.shape
    inverse_rms = residual.new_empty(rows, dtype=torch.float32)
    if out.numel():
        pieces, run = _runs(rows, 1, residual)
        gated_residual_rms_norm_forward_kernel[(pieces,)](
            residual, update, alpha, row_mask, weight, out, norm, inverse_rms, residual.stride(0),
            update.stride(0), rows, run, norm_eps, **_constants(alpha, row_mask, width), **_whole_row(width),
        )  # fmt: skip
    return out, norm, inverse_rms


@on_its_device
def gated_residual_rms_norm_backward(
    grad_out: torch.Tensor,
    grad_norm: torch.Tensor,
    out: torch.Tensor,
    update: torch.Tensor,
    alpha: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    row_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of residual [R, C], update [R, C], alpha and weight [C]."""
    d_residual, d_update = out.new_empty(out.shape), out.new_empty(out.shape)
    rows, width = out.shape
    if out.numel() == 0:
        return d_residual, d_update, torch.zeros_like(alpha), torch.zeros_like(weight)
    pieces, run = _runs(rows, 1, out)
    alpha_parts = out.new_empty((pieces, alpha.numel()), dtype=torch.float32)
    weight_parts = out.new_empty((pieces, width), dtype=torch.float32)
    gated_residual_rms_norm_backward_kernel[(pieces,)](
        grad_out, grad_norm, out, update, alpha, row_mask, weight, inverse_rms, d_residual, d_update, alpha_parts,
        weight_parts, grad_out.stride(0), grad_norm.stride(0), update.stride(0), rows, run,
        **_constants(alpha, row_mask, width), **_whole_row(width), HELD=width <= 4096 or alpha.numel() == 1,
    )  # fmt: skip
    return (
        d_residual,
        d_update,
        _add_alpha(alpha_parts, alpha),
        _add_channels(weight_parts, weight, gated=False),
    )


def _add_alpha(parts: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    if alpha.numel() > 1:
        return _add_channels(parts, alpha, gated=True)
    total = torch.empty_like(alpha)
    gated_residual_backward_scalar_kernel[(1,)](parts, alpha, total, parts.numel(), **_SCALAR)
    return total


def _add_channels(parts: torch.Tensor, like: torch.Tensor, *, gated: bool) -> torch.Tensor:
    total = torch.empty_like(like)
    pieces, width = parts.shape
    gated_residual_backward_channel_kernel[(-(-width // _CHANNELS["BLOCK_C"]),)](
        parts, like, total, pieces, GATED=gated, WIDTH=width, **_CHANNELS
    )
    return total


def _constants(alpha: torch.Tensor, row_mask: torch.Tensor | None, width: int) -> dict:
    return {"SCALAR": alpha.numel() == 1, "MASKED": row_mask is not None, "WIDTH": width}


def _runs(rows: int, columns: int, tensor: torch.Tensor) -> tuple[int, int]:
    """(programs along the rows, rows of each): about four programs a multiprocessor, at least 8 rows each."""
    wanted = max(1, 4 * multiprocessors(tensor) // columns)
    run = max(8, -(-rows // wanted))
    run = -(-run // BLOCK_R) * BLOCK_R
    return -(-rows // run), run


def _whole_row(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {"BLOCK_C": block, "num_warps": min(16, max(4, block // 512))}
