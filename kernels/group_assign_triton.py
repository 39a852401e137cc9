"""Group assignment by the Triton kernels: tile sizes and launches."""

from __future__ import annotations

import torch
import triton

from ._arch import architecture
from ._partials import sum_partials
from .group_assign_kernels import (
    group_assign_backward_kernel,
    group_assign_forward_kernel,
    group_assign_tokens_backward_kernel,
    group_assign_tokens_forward_kernel,
)

# (tokens a tile, groups a tile at most, channels a block at most, warps, stages) for two-byte elements.
FORWARD = {
    "sm_80": (64, 64, 128, 8, 1),
    "sm_90": (64, 64, 128, 8, 2),
    "sm_100": (64, 64, 128, 8, 1),
    "gfx942": (32, 64, 128, 8, 1),
    "interpret": (32, 16, 32, 4, 1),
}
BACKWARD = {
    "sm_80": (32, 64, 128, 8, 1),
    "sm_90": (64, 64, 128, 8, 1),
    "sm_100": (64, 64, 128, 8, 1),
    "gfx942": (32, 64, 128, 8, 1),
    "interpret": (32, 16, 32, 4, 1),
}


def _launch_options(table: dict[str, tuple[int, ...]], query: torch.Tensor) -> dict[str, int | bool | str]:
    block_n, most_groups, most_channels, warps, stages = table[architecture(query)]
    G, C = query.shape[1:]
    block_c = min(triton.next_power_of_2(max(C, 16)), most_channels)
    if query.element_size() == 4 and block_n > 16 and architecture(query) != "interpret":
        block_n //= 2
    return {
        "BLOCK_N": block_n,
        "BLOCK_G": min(triton.next_power_of_2(max(G, 16)), most_groups),
        "BLOCK_C": block_c,
        "C_BLOCKS": triton.cdiv(C, block_c),
        "EVEN_C": C % block_c == 0,
        "PRECISION": _precision(query),
        "num_warps": warps,
        "num_stages": stages,
    }


def _precision(query: torch.Tensor) -> str:
    """float32 products are exact to float32 unless torch was told that tf32 will do."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if architecture(query).startswith("sm_") else "ieee"


def _rowwise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


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
    options = _launch_options(FORWARD, query)
    out = query.new_empty((B, G, C))
    denominator = query.new_empty((B, G), dtype=torch.float32)
    assignment = query.new_empty((B, G, N) if return_assignment else (0,))
    choice = query.new_empty((B, N) if hard else (0,), dtype=torch.int32)
    lse, plain_lse = _token_statistics(
        query, key, seed, choice, row_offset, hard, gumbel, tau, return_assignment, options
    )
    group_tiles = triton.cdiv(G, int(options["BLOCK_G"]))
    if B:
        group_assign_forward_kernel[(group_tiles, B)](
            query,
            key,
            value,
            seed,
            lse,
            choice,
            plain_lse,
            out,
            denominator,
            assignment,
            row_offset,
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
            SINGLE=group_tiles == 1,
            **options,
        )
    return out, denominator, choice, assignment


def _token_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    seed: torch.Tensor,
    choice: torch.Tensor,
    row_offset: int,
    hard: bool,
    gumbel: bool,
    tau: float,
    plain: bool,
    options: dict[str, int | bool | str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp [B, N] with and without noise if the groups do not fit one tile, else stand-ins; writes choice."""
    (B, G, C), N = query.shape, key.shape[1]
    lse = query.new_empty((0,), dtype=torch.float32)
    if int(options["BLOCK_G"]) >= G:
        return lse, lse
    lse = query.new_empty((B, N), dtype=torch.float32)
    plain_lse = query.new_empty((B, N) if plain else (0,), dtype=torch.float32)
    if B and N:
        group_assign_tokens_forward_kernel[(triton.cdiv(N, int(options["BLOCK_N"])), B)](
            query,
            key,
            seed,
            lse,
            choice,
            plain_lse,
            row_offset,
            G,
            N,
            C,
            C**-0.5,
            1.0 / tau,
            *query.stride()[:2],
            *key.stride()[:2],
            HARD=hard,
            GUMBEL=gumbel,
            PLAIN=plain,
            **options,
        )
    return lse, plain_lse


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
    options = _launch_options(BACKWARD, query)
    group_tiles = triton.cdiv(G, int(options["BLOCK_G"]))
    plain = grad_assignment is not None
    plain_grad = grad_assignment.contiguous() if grad_assignment is not None else query
    grad_query = query.new_empty((B, G, C))
    grad_key, grad_value = query.new_empty((B, N, C)), query.new_empty((B, N, C))
    key_parts, value_parts = grad_key, grad_value
    if group_tiles > 1:
        key_parts, value_parts = (
            query.new_empty((group_tiles, B, N, C), dtype=torch.float32) for _ in range(2)
        )
    if not B:
        return grad_query, grad_key, grad_value
    # The choice is the forward's: here only the log-sum-exps are made again.
    lse, plain_lse = _token_statistics(
        query, key, seed, choice, row_offset, False, gumbel, tau, plain, options
    )
    token_dot, plain_dot = torch.empty_like(lse), torch.empty_like(plain_lse)
    inputs = (grad_out, plain_grad, query, key, value, out, denominator, seed)
    scalars = (C**-0.5, 1.0 / tau)
    strides = (
        *grad_out.stride()[:2],
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
    )
    if group_tiles > 1 and N:
        group_assign_tokens_backward_kernel[(triton.cdiv(N, int(options["BLOCK_N"])), B)](
            *inputs,
            lse,
            plain_lse,
            token_dot,
            plain_dot,
            row_offset,
            G,
            N,
            C,
            *scalars,
            *strides,
            GUMBEL=gumbel,
            PLAIN=plain,
            **options,
        )
    group_assign_backward_kernel[(group_tiles, B)](
        *inputs,
        lse,
        choice,
        plain_lse,
        token_dot,
        plain_dot,
        grad_query,
        key_parts,
        value_parts,
        row_offset,
        B,
        G,
        N,
        C,
        *scalars,
        *strides,
        HARD=hard,
        GUMBEL=gumbel,
        PLAIN=plain,
        SINGLE=group_tiles == 1,
        **options,
    )
    if group_tiles > 1:
        sum_partials(key_parts, grad_key)
        sum_partials(value_parts, grad_value)
    return grad_query, grad_key, grad_value
