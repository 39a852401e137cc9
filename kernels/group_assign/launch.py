"""Group assignment by the Triton kernels: tile sizes and launches.

Bytes moved, e an element, up to 256 tokens (t = 1 or 2 tiles of 128) and 64 groups, an image: forward
((t + 1) G + 2 N) C e, each input once but query once a tile; backward ((2 t + 5) G + 5 N) C e, since query, key and the
gradient of out pass by again for the products with the weights; beside them 4 bytes a group (the denominators) and, if
hard, 4 a token (the choices). Every further 256 tokens or 64 groups add partial results in float32, summed in a fixed
order.
"""

# Triton's launch syntax takes constants and options that the signatures do not show.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton

from ..common.arch import INTERPRETER, architecture
from ..common.launch import dot_precision, launch_column, on_its_device
from ..common.partials import sum_partials
from .kernels import (
    group_assign_backward_kernel,
    group_assign_forward_kernel,
    group_assign_merge_forward_kernel,
)

# (tokens a program at most, tokens a tile, groups a tile at most, channels a block, warps, stages), two-byte elements
FORWARD = {
    "sm_80": (256, 128, 64, 32, 8, 2),
    "sm_86": (128, 64, 64, 32, 8, 1),
    "sm_90": (256, 128, 64, 64, 8, 2),
    "sm_100": (256, 128, 64, 64, 8, 2),
    "gfx942": (256, 128, 64, 64, 8, 1),
    "interpret": (64, 32, 16, 32, 4, 1),
}
BACKWARD = {
    "sm_80": (256, 128, 64, 32, 8, 1),
    "sm_86": (64, 64, 64, 32, 8, 1),
    "sm_90": (256, 128, 64, 32, 8, 1),
    "sm_100": (256, 128, 64, 32, 8, 2),
    "gfx942": (256, 128, 64, 64, 8, 1),
    "interpret": (64, 32, 16, 32, 4, 1),
}
# For float32 on a GPU: its products are three of tf32 on NVIDIA, whose operands fill the registers; AMD's four warps
# have twice as many registers each as eight.
FLOAT32 = {"sm": (64, 32, 64, 16, 8, 1), "gfx": (64, 32, 64, 16, 4, 1)}
_MERGE_ROWS, _MERGE_CHANNELS = 16, 64


def _launch_options(
    table: dict[str, tuple[int, int, int, int, int, int]], query: torch.Tensor, key: torch.Tensor
) -> dict[str, Any]:
    most_tokens, block_n, most_groups, block_c, warps, stages = launch_column(table, query)
    (G, C), N = query.shape[1:], key.shape[1]
    if query.element_size() == 4 and architecture(query) != INTERPRETER:
        most_tokens, block_n, most_groups, block_c, warps, stages = FLOAT32[
            "gfx" if architecture(query).startswith("gfx") else "sm"
        ]
    block_c = min(triton.next_power_of_2(max(C, 16)), block_c)
    block_n = min(block_n, triton.next_power_of_2(max(N, min(block_n, 64))))
    return {
        "SUBS": min(max(1, triton.cdiv(N, block_n)), most_tokens // block_n) if most_groups >= G else 1,
        "BLOCK_N": block_n,
        "BLOCK_G": min(triton.next_power_of_2(max(G, 16)), most_groups),
        "BLOCK_C": block_c,
        "C_BLOCKS": triton.cdiv(C, block_c),
        "EVEN_C": C % block_c == 0,
        "PRECISION": dot_precision(query),
        "num_warps": warps,
        "num_stages": stages,
    }


def _rowwise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


@on_its_device
def group_assign_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    row_offset: int,
    hard: bool,
    gumbel: bool,
    tau: float,
    eps: float,
    return_assignment: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``group_assign_torch``."""
    query, key, value = _rowwise(query), _rowwise(key), _rowwise(value)
    (B, G, C), N = query.shape, key.shape[1]
    options = _launch_options(FORWARD, query, key)
    tiles = max(1, triton.cdiv(N, options["SUBS"] * options["BLOCK_N"]))
    out = query.new_empty((B, G, C))
    denominator = query.new_empty((B, G), dtype=torch.float32)
    choice = query.new_empty((B, N) if hard else (0,), dtype=torch.int32)
    assignment = query.new_empty((B, G, N) if return_assignment else (0,))
    sums, counts = out, denominator
    if tiles > 1:
        sums = query.new_empty((tiles, B, G, C), dtype=torch.float32)
        counts = query.new_empty((tiles, B, G), dtype=torch.float32)
    if B:
        group_assign_forward_kernel[(tiles, B)](
            query,
            key,
            value,
            seed,
            sums,
            counts,
            denominator,
            choice,
            assignment,
            row_offset,
            B,
            G,
            N,
            C,
            C**-0.5,
            1.0 / tau,
            eps,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            HARD=hard,
            GUMBEL=gumbel,
            PLAIN=return_assignment,
            GROUP_TILES=triton.cdiv(G, options["BLOCK_G"]),
            WHOLE=tiles == 1,
            **options,
        )
    if tiles > 1 and B:
        group_assign_merge_forward_kernel[(triton.cdiv(B * G, _MERGE_ROWS), triton.cdiv(C, _MERGE_CHANNELS))](
            sums,
            counts,
            out,
            denominator,
            tiles,
            B * G,
            C,
            eps,
            BLOCK_R=_MERGE_ROWS,
            BLOCK_C=_MERGE_CHANNELS,
            num_warps=4,
        )
    return out, denominator, choice, assignment


@on_its_device
def group_assign_triton_backward(
    grad_out: torch.Tensor,
    grad_assignment: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    denominator: torch.Tensor,
    choice: torch.Tensor,
    seed: torch.Tensor,
    row_offset: int,
    hard: bool,
    gumbel: bool,
    tau: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``group_assign_torch_backward``."""
    query, key, value, grad_out = (_rowwise(x) for x in (query, key, value, grad_out.to(query.dtype)))
    (B, G, C), N = query.shape, key.shape[1]
    options = _launch_options(BACKWARD, query, key)
    token_tiles = max(1, triton.cdiv(N, options["SUBS"] * options["BLOCK_N"]))
    group_tiles = triton.cdiv(G, options["BLOCK_G"])
    grad_query = query.new_empty((B, G, C))
    grad_key, grad_value = query.new_empty((B, N, C)), query.new_empty((B, N, C))
    query_parts, key_parts, value_parts = grad_query, grad_key, grad_value
    if token_tiles > 1:
        query_parts = query.new_empty((token_tiles, B, G, C), dtype=torch.float32)
    if group_tiles > 1:
        key_parts = query.new_empty((group_tiles, B, N, C), dtype=torch.float32)
        value_parts = query.new_empty((group_tiles, B, N, C), dtype=torch.float32)
    if not B:
        return grad_query, grad_key, grad_value
    group_assign_backward_kernel[(token_tiles, B)](
        grad_out,
        grad_assignment.contiguous() if grad_assignment is not None else query,
        query,
        key,
        value,
        out,
        denominator,
        choice,
        seed,
        query_parts,
        key_parts,
        value_parts,
        row_offset,
        B,
        G,
        N,
        C,
        C**-0.5,
        1.0 / tau,
        *grad_out.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        HARD=hard,
        GUMBEL=gumbel,
        PLAIN=grad_assignment is not None,
        GROUP_TILES=group_tiles,
        **options,
    )
    if token_tiles > 1:
        sum_partials(query_parts, grad_query)
    if group_tiles > 1 and N:
        sum_partials(key_parts, grad_key)
        sum_partials(value_parts, grad_value)
    return grad_query, grad_key, grad_value
