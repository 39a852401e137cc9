"""Launches of the gated residual sum, alone and fused with the RMSNorm that follows it; what they cost.

Everything is one pass over the rows. Gradients summed over rows (alpha, norm weight) are accumulated by each
program over its own run of rows and written as one float32 partial; a last kernel adds the partials in a fixed
order, so repeated runs are bitwise equal. ``bytes_moved`` says what that costs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton declares constexpr parameters as a class, and launch options not at all.
from __future__ import annotations

from collections import Counter

import torch
import triton

from ..common.arch import multiprocessors
from ..common.launch import on_its_device
from ..common.traffic import Floor, Traffic, float32_sum_bytes
from .kernels import (
    gated_residual_backward_channel_kernel,
    gated_residual_backward_kernel,
    gated_residual_backward_scalar_kernel,
    gated_residual_forward_kernel,
    gated_residual_rms_norm_backward_kernel,
    gated_residual_rms_norm_forward_kernel,
)

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
        pieces, run = _runs(rows, -(-width // BLOCK_C), multiprocessors(residual))
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
    pieces, run = _runs(rows, columns, multiprocessors(update))
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
        pieces, run = _runs(rows, 1, multiprocessors(residual))
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
    pieces, run = _runs(rows, 1, multiprocessors(out))
    alpha_parts = out.new_empty((pieces, alpha.numel()), dtype=torch.float32)
    weight_parts = out.new_empty((pieces, width), dtype=torch.float32)
    gated_residual_rms_norm_backward_kernel[(pieces,)](
        grad_out, grad_norm, out, update, alpha, row_mask, weight, inverse_rms, d_residual, d_update, alpha_parts,
        weight_parts, grad_out.stride(0), grad_norm.stride(0), update.stride(0), rows, run,
        **_constants(alpha, row_mask, width), **_whole_row(width), HELD=_held(width, alpha.numel()),
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


def _held(width: int, gates: int) -> bool:
    """Whether a program keeps the norm's weight in registers; else it reads it again for every row."""
    return width <= 4096 or gates == 1


def _runs(rows: int, columns: int, processors: int) -> tuple[int, int]:
    """(programs along the rows, rows of each): about four programs a multiprocessor, at least 8 rows each."""
    wanted = max(1, 4 * processors // columns)
    run = max(8, -(-rows // wanted))
    run = -(-run // BLOCK_R) * BLOCK_R
    return -(-rows // run), run


def _whole_row(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {"BLOCK_C": block, "num_warps": min(16, max(4, block // 512))}


def bytes_moved(
    rows: int,
    channels: int,
    element_bytes: int,
    *,
    updated_rows: int,
    gates: int,
    gate_bytes: int,
    processors: int,
    masked: bool = True,
) -> Traffic:
    """Bytes of :func:`gated_residual` and :func:`gated_residual_backward`, exactly.

    The floor is each input read once and each output written once; the gradient of the residual is the gradient of
    the sum itself.

    Args:
        rows, channels: size of the maps, of ``element_bytes`` an element.
        updated_rows: rows that take the update; only in these is it read.
        gates: numbers in alpha, 1 or ``channels``, of ``gate_bytes`` each.
        processors: multiprocessors of the device, which share the rows.
        masked: whether there is a mask, of one byte a row.
    """
    column_blocks = -(-channels // BLOCK_C)
    runs, _ = _runs(rows, column_blocks, processors)
    mask = rows if masked else 0
    alpha = gates * gate_bytes
    # Every run of rows reads the gates of its block of channels and leaves their gradients as a float32 partial sum.
    gate_reads = runs * (channels if gates > 1 else column_blocks)
    row_bytes = channels * element_bytes
    maps_forward = row_bytes * (2 * rows + updated_rows)
    maps_backward = row_bytes * (rows + 2 * updated_rows)
    return Traffic(
        forward={
            "gated_residual_forward_kernel": maps_forward + column_blocks * mask + gate_reads * gate_bytes,
        },
        backward={
            "gated_residual_backward_kernel": maps_backward
            + column_blocks * mask
            + gate_reads * (gate_bytes + 4),
            _adding_kernel(gates): 4 * gate_reads + 2 * alpha,
        },
        floor=Floor(maps_forward + mask + alpha, maps_backward + mask + 2 * alpha),
    )


def bytes_moved_rms_norm(
    rows: int,
    channels: int,
    element_bytes: int,
    *,
    updated_rows: int,
    gates: int,
    gate_bytes: int,
    weight_bytes: int,
    processors: int,
    masked: bool = True,
) -> Traffic:
    """Bytes of :func:`gated_residual_rms_norm` and its backward pass, exactly.

    As :func:`bytes_moved`; ``weight_bytes`` are those of an element of the norm's weight. Beside the maps 1 / rms, a
    float32 a row, is written forward and read backward; the floor leaves it out.
    """
    runs, _ = _runs(rows, 1, processors)
    mask = rows if masked else 0
    alpha, weight = gates * gate_bytes, channels * weight_bytes
    weight_reads = runs if _held(channels, gates) else rows
    row_bytes = channels * element_bytes
    maps_forward = row_bytes * (3 * rows + updated_rows)
    maps_backward = row_bytes * (5 * rows + updated_rows)
    adding = Counter({_adding_kernel(gates): 4 * runs * gates + 2 * alpha})
    adding["gated_residual_backward_channel_kernel"] += float32_sum_bytes(runs, channels, weight_bytes)
    return Traffic(
        forward={
            "gated_residual_rms_norm_forward_kernel": maps_forward + mask + 4 * rows + runs * (alpha + weight)
        },
        backward={
            "gated_residual_rms_norm_backward_kernel": maps_backward
            + mask
            + 4 * rows
            + runs * alpha
            + weight_reads * weight
            + 4 * runs * (gates + channels),
            **adding,
        },
        floor=Floor(maps_forward + mask + alpha + weight, maps_backward + mask + 2 * (alpha + weight)),
    )


def _adding_kernel(gates: int) -> str:
    """The kernel that adds the partial sums of alpha's gradient."""
    return f"gated_residual_backward_{'channel' if gates > 1 else 'scalar'}_kernel"
