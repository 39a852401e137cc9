"""Sums of partial results in a fixed order: what kernels use instead of atomics."""

# Triton's launch syntax takes constants and options that the signatures do not show.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["P"])
def partial_sums_backward_kernel(parts, total, P, L, BLOCK: tl.constexpr):
    """total [L] = sum over the rows of parts [P, L], first to last, in float32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < L
    pointers = parts + at
    value = tl.load(pointers, mask=ok, other=0.0)
    for _ in range(1, P):
        pointers += L
        value += tl.load(pointers, mask=ok, other=0.0)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=ok)


def sum_partials(parts: torch.Tensor, total: torch.Tensor) -> None:
    """Write the sum over the first dimension of ``parts`` [P, ...], float32, to ``total`` [...], both contiguous."""
    partial_sums_backward_kernel[(triton.cdiv(total.numel(), _BLOCK),)](
        parts, total, parts.shape[0], total.numel(), BLOCK=_BLOCK, num_warps=4
    )
