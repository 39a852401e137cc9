"""Group assignment by the Triton kernels: tile sizes and launches.

A program takes an image, or so many of its tokens as a tile holds (256 of two bytes); further tokens, and groups beyond
a tile of them, add partial results in float32, summed in a fixed order. ``bytes_moved`` says what that costs.
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
from ..common.traffic import Floor, Traffic, float32_sum_bytes
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
        maker = "gfx" if architecture(query).startswith("gfx") else "sm"
        most_tokens, block_n, most_groups, block_c, warps, stages = FLOAT32[maker]
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


def _token_tiles(tokens: int, options: dict[str, Any]) -> int:
    """Programs an image, each with its share of the tokens."""
    return max(1, triton.cdiv(tokens, options["SUBS"] * options["BLOCK_N"]))


def _rowwise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


@on_its_device
def forward(
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
    """As ``torch_path.forward``."""
    query, key, value = _rowwise(query), _rowwise(key), _rowwise(value)
    (B, G, C), N = query.shape, key.shape[1]
    options = _launch_options(FORWARD, query, key)
    tiles = _token_tiles(N, options)
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
            query, key, value, seed, sums, counts, denominator, choice, assignment, row_offset, B, G, N, C,
            C**-0.5, 1.0 / tau, eps, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
            HARD=hard, GUMBEL=gumbel, PLAIN=return_assignment, GROUP_TILES=triton.cdiv(G, options["BLOCK_G"]),
            WHOLE=tiles == 1, **options,
        )  # fmt: skip
    if tiles > 1 and B:
        group_assign_merge_forward_kernel[(triton.cdiv(B * G, _MERGE_ROWS), triton.cdiv(C, _MERGE_CHANNELS))](
            sums, counts, out, denominator, tiles, B * G, C, eps, BLOCK_R=_MERGE_ROWS, BLOCK_C=_MERGE_CHANNELS,
            num_warps=4,
        )  # fmt: skip
    return out, denominator, choice, assignment


@on_its_device
def backward(
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
    """As ``torch_path.backward``."""
    query, key, value, grad_out = (_rowwise(x) for x in (query, key, value, grad_out.to(query.dtype)))
    (B, G, C), N = query.shape, key.shape[1]
    options = _launch_options(BACKWARD, query, key)
    token_tiles = _token_tiles(N, options)
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
        grad_out, grad_assignment.contiguous() if grad_assignment is not None else query,
        query, key, value, out, denominator, choice, seed, query_parts, key_parts, value_parts,
        row_offset, B, G, N, C, C**-0.5, 1.0 / tau,
        *grad_out.stride()[:2], *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        HARD=hard, GUMBEL=gumbel, PLAIN=grad_assignment is not None, GROUP_TILES=group_tiles, **options,
    )  # fmt: skip
    if token_tiles > 1:
        sum_partials(query_parts, grad_query)
    if group_tiles > 1 and N:
        sum_partials(key_parts, grad_key)
        sum_partials(value_parts, grad_value)
    return grad_query, grad_key, grad_value


def bytes_moved(
    query: torch.Tensor, key: torch.Tensor, *, hard: bool = True, return_assignment: bool = False
) -> Traffic:
    """Bytes of :func:`forward` and :func:`backward`, exactly.

    The floor is each input read once and each output written once; backward the inputs are query, key, value, out and
    its gradient.

    Args:
        query, key: [B, G, C] and [B, N, C]; of them only shape, dtype and device count, so ``meta`` will do.
        hard: whether choices are kept for the backward pass, 4 bytes a token.
        return_assignment: whether the soft assignment is written too, and its gradient read.
    """
    (images, groups, channels), tokens, element = query.shape, key.shape[1], query.element_size()
    row_bytes = channels * element
    all_groups, all_tokens = images * groups * row_bytes, images * tokens * row_bytes
    floor = Floor(2 * all_groups + 2 * all_tokens, 4 * all_groups + 4 * all_tokens)
    if not images:
        return Traffic({}, {}, floor)
    choices = 4 * tokens if hard else 0
    assignment = tokens * groups * element if return_assignment else 0
    return Traffic(
        _forward_bytes(query, tokens, _launch_options(FORWARD, query, key), choices, assignment),
        _backward_bytes(query, tokens, _launch_options(BACKWARD, query, key), choices, assignment),
        floor,
    )


def _forward_bytes(
    query: torch.Tensor, tokens: int, options: dict[str, Any], choices: int, assignment: int
) -> dict[str, int]:
    (images, groups, channels), element = query.shape, query.element_size()
    row_bytes = channels * element
    token_tiles, group_tiles = _token_tiles(tokens, options), triton.cdiv(groups, options["BLOCK_G"])
    several_groups = group_tiles > 1
    # A tile of groups meets all tokens twice, as keys and as values; the groups pass by once a subtile of tokens. With
    # several tiles of groups a first pass makes all the logits to find each token's maximum and sum.
    token_rows = group_tiles * tokens * (2 + several_groups)
    group_rows = token_tiles * groups * (options["SUBS"] + several_groups)
    sums = groups * row_bytes if token_tiles == 1 else token_tiles * groups * channels * 4
    seed, counts = 8 * token_tiles, 4 * token_tiles * groups
    image = row_bytes * (token_rows + group_rows) + seed + counts + sums + choices + assignment
    moved = {"group_assign_forward_kernel": images * image}
    if token_tiles > 1:
        rows, channel_blocks = images * groups, triton.cdiv(channels, _MERGE_CHANNELS)
        counts = 4 * rows * (token_tiles * channel_blocks + 1)
        merged = float32_sum_bytes(token_tiles, rows * channels, element)
        moved["group_assign_merge_forward_kernel"] = merged + counts
    return moved


def _backward_bytes(
    query: torch.Tensor, tokens: int, options: dict[str, Any], choices: int, assignment: int
) -> dict[str, int]:
    (images, groups, channels), element = query.shape, query.element_size()
    row_bytes = channels * element
    token_tiles, group_tiles = _token_tiles(tokens, options), triton.cdiv(groups, options["BLOCK_G"])
    # Over the logits; of two the first finds each token's maximum, sum and dot product.
    passes = 2 if group_tiles > 1 else 1
    # Of a token the key and the value in every pass, and the key again for the gradient of the query. Of a group out
    # and its gradient, whose product is each group's share in the division; query and gradient once a subtile of
    # tokens for the logits, and once more each for the products with the weights.
    token_reads = group_tiles * tokens * (2 * passes + 1)
    subtiles = options["SUBS"] + passes - 1
    group_reads = token_tiles * groups * (2 * passes + 2 * subtiles + 2)
    token_writes = 2 * tokens * row_bytes if group_tiles == 1 else 2 * group_tiles * tokens * channels * 4
    group_writes = groups * row_bytes if token_tiles == 1 else token_tiles * groups * channels * 4
    seed, denominators = 8 * token_tiles, 4 * passes * token_tiles * groups
    image = row_bytes * (token_reads + group_reads) + token_writes + group_writes + seed + denominators
    image += group_tiles * choices + passes * assignment
    moved = {"group_assign_backward_kernel": images * image}
    added = 0
    if token_tiles > 1:
        added += float32_sum_bytes(token_tiles, images * groups * channels, element)
    if group_tiles > 1:
        added += 2 * float32_sum_bytes(group_tiles, images * tokens * channels, element)
    return moved | ({"partial_sums_backward_kernel": added} if added else {})
