"""Triton kernels of group assignment.

Tokens stand on the rows of every tile, [BLOCK_N, BLOCK_G]: a token's softmax over groups then stays within a few
threads, and even 8 groups make products with the 64 rows that tensor cores ask for. Channels come in C_BLOCKS blocks
of BLOCK_C, held as a tuple of tiles. With SINGLE all groups fit one tile; otherwise a first kernel leaves every
token's log-sum-exps and choice, 4 bytes each, and the main kernels take the groups a tile at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import gumbel_tile


@triton.jit
def _channel_tiles(
    pointer, rows, limit, stride, C, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr, EVEN_C: tl.constexpr
):
    """[rows, C] of a matrix whose rows lie ``stride`` apart, as C_BLOCKS tiles; zeros outside."""
    tiles = ()
    pointers = pointer + rows.to(tl.int64)[:, None] * stride
    for block in tl.static_range(C_BLOCKS):
        channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (rows < limit)[:, None]
        if not EVEN_C:
            mask = mask & (channels < C)[None, :]
        tiles = tiles + (tl.load(pointers + channels[None, :], mask=mask, other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def _store_channel_tile(
    pointer, tile, rows, limit, stride, block, C, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr
):
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < limit)[:, None]
    if not EVEN_C:
        mask = mask & (channels < C)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _zero_tiles(ROWS: tl.constexpr, COLUMNS: tl.constexpr, C_BLOCKS: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(C_BLOCKS):
        tiles = tiles + (tl.zeros((ROWS, COLUMNS), dtype=tl.float32),)  # noqa: RUF005
    return tiles


@triton.jit
def _product(left, right, C_BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """[N, C] times [G, C] transposed, in float32."""
    tile = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for block in tl.static_range(1, C_BLOCKS):
        tile = tl.dot(left[block], tl.trans(right[block]), tile, input_precision=PRECISION)
    return tile


@triton.jit
def _noisy(
    logits, seed, row, first, groups, GUMBEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    if GUMBEL:
        return logits + gumbel_tile(seed, row, first, groups, BLOCK_N, BLOCK_G)
    return logits


@triton.jit
def group_assign_tokens_forward_kernel(
    query, key, seed, token_lse, token_choice, plain_lse,
    row_offset, G, N, C, scale, inverse_tau,
    stride_qb, stride_qg, stride_kb, stride_kn,
    HARD: tl.constexpr, GUMBEL: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For more groups than a tile: every token's log-sum-exp (with noise; without, if PLAIN) and, if HARD, choice [B, N].

    Grid (token tiles, B).
    """
    first, b = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64)
    tokens = first + tl.arange(0, BLOCK_N)
    seed_value = tl.load(seed)
    keys = _channel_tiles(key + b * stride_kb, tokens, N, stride_kn, C, BLOCK_C, C_BLOCKS, EVEN_C)
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    choice = tl.zeros((BLOCK_N,), dtype=tl.int32)
    plain_top, plain_total = top, total
    for first_group in range(0, G, BLOCK_G):
        groups = first_group + tl.arange(0, BLOCK_G)
        queries = _channel_tiles(query + b * stride_qb, groups, G, stride_qg, C, BLOCK_C, C_BLOCKS, EVEN_C)
        plain = _product(keys, queries, C_BLOCKS, PRECISION) * scale
        logits = _noisy(plain, seed_value, row_offset + b, first, groups, GUMBEL, BLOCK_N, BLOCK_G)
        logits = tl.where((groups < G)[None, :], logits * inverse_tau, float("-inf"))
        best = tl.max(logits, axis=1)
        if HARD:
            # Only a strictly larger logit replaces the choice, so ties go to the first group.
            choice = tl.where(best > top, first_group + tl.argmax(logits, axis=1), choice)
        new_top = tl.maximum(top, best)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
        top = new_top
        if PLAIN:
            plain = tl.where((groups < G)[None, :], plain * inverse_tau, float("-inf"))
            new_top = tl.maximum(plain_top, tl.max(plain, axis=1))
            plain_total = plain_total * tl.exp(plain_top - new_top)
            plain_total += tl.sum(tl.exp(plain - new_top[:, None]), axis=1)
            plain_top = new_top
    mask = tokens < N
    tl.store(token_lse + b * N + tokens, top + tl.log(total), mask=mask)
    if HARD:
        tl.store(token_choice + b * N + tokens, choice, mask=mask)
    if PLAIN:
        tl.store(plain_lse + b * N + tokens, plain_top + tl.log(plain_total), mask=mask)


@triton.jit
def _soft(logits, groups, G, lse, SINGLE: tl.constexpr):
    """Softmax over groups of a tile [N, G]; by the token's log-sum-exp if the tile does not hold all groups."""
    logits = tl.where((groups < G)[None, :], logits, float("-inf"))
    if SINGLE:
        exponential = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return exponential / tl.sum(exponential, axis=1)[:, None]
    return tl.exp(logits - lse[:, None])


@triton.jit
def group_assign_forward_kernel(
    query, key, value, seed, token_lse, token_choice, plain_lse, out, denominator, assignment,
    row_offset, G, N, C, scale, inverse_tau, eps,
    stride_qb, stride_qg, stride_kb, stride_kn, stride_vb, stride_vn,
    HARD: tl.constexpr, GUMBEL: tl.constexpr, PLAIN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [B, G, C], denominator [B, G], if HARD the choice [B, N] and, if PLAIN, the assignment [B, G, N].

    Grid (group tiles, B)."""
    first_group, b = tl.program_id(0) * BLOCK_G, tl.program_id(1).to(tl.int64)
    groups = first_group + tl.arange(0, BLOCK_G)
    seed_value = tl.load(seed)
    queries = _channel_tiles(query + b * stride_qb, groups, G, stride_qg, C, BLOCK_C, C_BLOCKS, EVEN_C)
    sums = _zero_tiles(BLOCK_C, BLOCK_G, C_BLOCKS)  # out transposed: [C, G]
    count = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for first in range(0, N, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        token_ok = tokens < N
        keys = _channel_tiles(key + b * stride_kb, tokens, N, stride_kn, C, BLOCK_C, C_BLOCKS, EVEN_C)
        values = _channel_tiles(value + b * stride_vb, tokens, N, stride_vn, C, BLOCK_C, C_BLOCKS, EVEN_C)
        plain = _product(keys, queries, C_BLOCKS, PRECISION) * scale
        logits = (
            _noisy(plain, seed_value, row_offset + b, first, groups, GUMBEL, BLOCK_N, BLOCK_G) * inverse_tau
        )
        lse = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if HARD:
            if SINGLE:
                choice = tl.argmax(tl.where((groups < G)[None, :], logits, float("-inf")), axis=1)
                tl.store(token_choice + b * N + tokens, choice, mask=token_ok)
            else:
                choice = tl.load(token_choice + b * N + tokens, mask=token_ok, other=0)
            weights = tl.where(groups[None, :] == choice[:, None], 1.0, 0.0)
        else:
            if not SINGLE:
                lse = tl.load(token_lse + b * N + tokens, mask=token_ok, other=float("inf"))
            weights = _soft(logits, groups, G, lse, SINGLE)
        weights = tl.where(token_ok[:, None], weights, 0.0)
        count += tl.sum(weights, axis=0)
        new_sums = ()
        for block in tl.static_range(C_BLOCKS):
            part = tl.dot(
                tl.trans(values[block]),
                weights.to(values[block].dtype),
                sums[block],
                input_precision=PRECISION,
            )
            new_sums = new_sums + (part,)  # noqa: RUF005
        sums = new_sums
        if PLAIN:
            if not SINGLE:
                lse = tl.load(plain_lse + b * N + tokens, mask=token_ok, other=float("inf"))
            soft = _soft(plain * inverse_tau, groups, G, lse, SINGLE)
            pointers = assignment + (b * G + groups)[None, :] * N + tokens[:, None]
            mask = token_ok[:, None] & (groups < G)[None, :]
            tl.store(pointers, soft.to(assignment.dtype.element_ty), mask=mask)
    count += eps
    tl.store(denominator + b * G + groups, count, mask=groups < G)
    for block in tl.static_range(C_BLOCKS):
        tile = tl.trans(sums[block] / count[None, :])
        _store_channel_tile(out + b * G * C, tile, groups, G, C, block, C, BLOCK_C, EVEN_C)


@triton.jit
def _output_gradient(
    grad_out, out, denominator, b, groups, G, C, stride_gb, stride_gg,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """The gradient of out over the denominator, as tiles [G, C] in its dtype, and its dot with out, [G]."""
    divisor = tl.load(denominator + b * G + groups, mask=groups < G, other=1.0)
    delta = tl.zeros((BLOCK_G,), dtype=tl.float32)
    tiles = ()
    for block in tl.static_range(C_BLOCKS):
        channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (groups < G)[:, None]
        if not EVEN_C:
            mask = mask & (channels < C)[None, :]
        wide = groups.to(tl.int64)[:, None]
        grad = tl.load(grad_out + b * stride_gb + wide * stride_gg + channels[None, :], mask=mask, other=0.0)
        result = tl.load(out + (b * G + wide) * C + channels[None, :], mask=mask, other=0.0)
        tile = grad.to(tl.float32) / divisor[:, None]
        delta += tl.sum(tile * result.to(tl.float32), axis=1)
        tiles = tiles + (tile.to(grad_out.dtype.element_ty),)  # noqa: RUF005
    return tiles, delta


@triton.jit
def group_assign_tokens_backward_kernel(
    grad_out, grad_assignment, query, key, value, out, denominator, seed,
    token_lse, plain_lse, token_dot, plain_dot,
    row_offset, G, N, C, scale, inverse_tau,
    stride_gb, stride_gg, stride_qb, stride_qg, stride_kb, stride_kn, stride_vb, stride_vn,
    GUMBEL: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For more groups than a tile: every token's sum over groups of soft times its gradient [B, N].

    Grid (token tiles, B).
    """
    first, b = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64)
    tokens = first + tl.arange(0, BLOCK_N)
    token_ok = tokens < N
    seed_value = tl.load(seed)
    keys = _channel_tiles(key + b * stride_kb, tokens, N, stride_kn, C, BLOCK_C, C_BLOCKS, EVEN_C)
    values = _channel_tiles(value + b * stride_vb, tokens, N, stride_vn, C, BLOCK_C, C_BLOCKS, EVEN_C)
    lse = tl.load(token_lse + b * N + tokens, mask=token_ok, other=float("inf"))
    dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    plain_dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first_group in range(0, G, BLOCK_G):
        groups = first_group + tl.arange(0, BLOCK_G)
        queries = _channel_tiles(query + b * stride_qb, groups, G, stride_qg, C, BLOCK_C, C_BLOCKS, EVEN_C)
        grads, delta = _output_gradient(
            grad_out,
            out,
            denominator,
            b,
            groups,
            G,
            C,
            stride_gb,
            stride_gg,
            BLOCK_G,
            BLOCK_C,
            C_BLOCKS,
            EVEN_C,
        )
        plain = _product(keys, queries, C_BLOCKS, PRECISION) * scale
        logits = _noisy(plain, seed_value, row_offset + b, first, groups, GUMBEL, BLOCK_N, BLOCK_G)
        soft = _soft(logits * inverse_tau, groups, G, lse, False)
        dots += tl.sum(soft * (_product(values, grads, C_BLOCKS, PRECISION) - delta[None, :]), axis=1)
        if PLAIN:
            plain_soft = _soft(
                plain * inverse_tau,
                groups,
                G,
                tl.load(plain_lse + b * N + tokens, mask=token_ok, other=float("inf")),
                False,
            )
            pointers = grad_assignment + (b * G + groups)[None, :] * N + tokens[:, None]
            mask = token_ok[:, None] & (groups < G)[None, :]
            plain_dots += tl.sum(plain_soft * tl.load(pointers, mask=mask, other=0.0).to(tl.float32), axis=1)
    tl.store(token_dot + b * N + tokens, dots, mask=token_ok)
    if PLAIN:
        tl.store(plain_dot + b * N + tokens, plain_dots, mask=token_ok)


@triton.jit
def group_assign_backward_kernel(
    grad_out, grad_assignment, query, key, value, out, denominator, seed,
    token_lse, token_choice, plain_lse, token_dot, plain_dot,
    grad_query, grad_key, grad_value,
    row_offset, B, G, N, C, scale, inverse_tau,
    stride_gb, stride_gg, stride_qb, stride_qg, stride_kb, stride_kn, stride_vb, stride_vn,
    HARD: tl.constexpr, GUMBEL: tl.constexpr, PLAIN: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query [B, G, C]; grad_key, grad_value [group tiles, B, N, C], one part a group tile. Grid (group tiles, B)."""
    tile_index, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    groups = tile_index * BLOCK_G + tl.arange(0, BLOCK_G)
    group_ok = groups < G
    seed_value = tl.load(seed)
    queries = _channel_tiles(query + b * stride_qb, groups, G, stride_qg, C, BLOCK_C, C_BLOCKS, EVEN_C)
    grads, delta = _output_gradient(
        grad_out, out, denominator, b, groups, G, C, stride_gb, stride_gg, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C
    )
    sums = _zero_tiles(BLOCK_C, BLOCK_G, C_BLOCKS)  # grad_query transposed: [C, G]
    part_start = (tile_index * B + b) * N * C
    for first in range(0, N, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        token_ok = tokens < N
        keys = _channel_tiles(key + b * stride_kb, tokens, N, stride_kn, C, BLOCK_C, C_BLOCKS, EVEN_C)
        values = _channel_tiles(value + b * stride_vb, tokens, N, stride_vn, C, BLOCK_C, C_BLOCKS, EVEN_C)
        plain = _product(keys, queries, C_BLOCKS, PRECISION) * scale
        logits = (
            _noisy(plain, seed_value, row_offset + b, first, groups, GUMBEL, BLOCK_N, BLOCK_G) * inverse_tau
        )
        lse = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if not SINGLE:
            lse = tl.load(token_lse + b * N + tokens, mask=token_ok, other=float("inf"))
        soft = _soft(logits, groups, G, lse, SINGLE)
        weights = soft
        if HARD:
            # The saved choice, so that a logit rounded otherwise here cannot tip a near tie.
            choice = tl.load(token_choice + b * N + tokens, mask=token_ok, other=0)
            weights = tl.where(groups[None, :] == choice[:, None], 1.0, 0.0)
        grad_weights = _product(values, grads, C_BLOCKS, PRECISION) - delta[None, :]
        if SINGLE:
            dots = tl.sum(soft * grad_weights, axis=1)
        else:
            dots = tl.load(token_dot + b * N + tokens, mask=token_ok, other=0.0)
        grad_logits = soft * (grad_weights - dots[:, None])
        if PLAIN:
            pointers = grad_assignment + (b * G + groups)[None, :] * N + tokens[:, None]
            mask = token_ok[:, None] & group_ok[None, :]
            grad_weights = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            if not SINGLE:
                lse = tl.load(plain_lse + b * N + tokens, mask=token_ok, other=float("inf"))
            soft = _soft(plain * inverse_tau, groups, G, lse, SINGLE)
            if SINGLE:
                dots = tl.sum(soft * grad_weights, axis=1)
            else:
                dots = tl.load(plain_dot + b * N + tokens, mask=token_ok, other=0.0)
            grad_logits += soft * (grad_weights - dots[:, None])
        # Rows of tokens that are not there: their weights are not stored, but they must not reach grad_query.
        grad_logits = tl.where(token_ok[:, None], grad_logits, 0.0).to(query.dtype.element_ty)
        narrow = weights.to(query.dtype.element_ty)
        new_sums = ()
        for block in tl.static_range(C_BLOCKS):
            tile = tl.dot(narrow, grads[block], input_precision=PRECISION)
            _store_channel_tile(grad_value + part_start, tile, tokens, N, C, block, C, BLOCK_C, EVEN_C)
            tile = tl.dot(grad_logits, queries[block], input_precision=PRECISION) * (scale * inverse_tau)
            _store_channel_tile(grad_key + part_start, tile, tokens, N, C, block, C, BLOCK_C, EVEN_C)
            part = tl.dot(tl.trans(keys[block]), grad_logits, sums[block], input_precision=PRECISION)
            new_sums = new_sums + (part,)  # noqa: RUF005
        sums = new_sums
    for block in tl.static_range(C_BLOCKS):
        tile = tl.trans(sums[block]) * (scale * inverse_tau)
        _store_channel_tile(grad_query + b * G * C, tile, groups, G, C, block, C, BLOCK_C, EVEN_C)
