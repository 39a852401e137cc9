"""Triton kernels of group assignment: a program holds one image's tokens (up to 256) and all that is theirs.

Tokens stand on the rows of every tile, [BLOCK_N, BLOCK_G]: a token's softmax over groups then stays within a few
threads, and even 8 groups make products with the 64 rows that tensor cores ask for. A program makes SUBS such tiles
one after another, because together their logits and noise would not fit the registers, and keeps them as a tuple of
narrow ones. Channels pass by in blocks of BLOCK_C, so nothing as large as [N, C] is ever held. With GROUP_TILES 1 all
groups fit one tile; otherwise (then SUBS is 1) a first pass finds every token's maximum, sum and choice, and a second
takes the groups a tile at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.philox import gumbel_tile


@triton.jit
def _load(pointer, rows, limit, stride, block, C, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr):
    """[rows, BLOCK_C] of a matrix whose rows lie ``stride`` apart; zeros outside."""
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < limit)[:, None]
    if not EVEN_C:
        mask = mask & (channels < C)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, tile, rows, limit, stride, block, C, BLOCK_C: tl.constexpr, EVEN_C: tl.constexpr):
    channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < limit)[:, None]
    if not EVEN_C:
        mask = mask & (channels < C)[None, :]
    pointers = pointer + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    left, right, tokens, groups, N, G, left_stride, right_stride, C,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left [N, C] times right [G, C] transposed: the tile [BLOCK_N, BLOCK_G] in float32."""
    tile = tl.zeros((BLOCK_N, BLOCK_G), dtype=tl.float32)
    for block in range(C_BLOCKS):
        a = _load(left, tokens, N, left_stride, block, C, BLOCK_C, EVEN_C)
        b = _load(right, groups, G, right_stride, block, C, BLOCK_C, EVEN_C)
        tile = tl.dot(a, tl.trans(b), tile, input_precision=PRECISION)
    return tile


@triton.jit
def _noisy(
    logits, seed, row, tokens, first_group, GUMBEL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr
):
    if GUMBEL:
        return logits + gumbel_tile(seed, row, tokens, first_group, BLOCK_N, BLOCK_G)
    return logits


@triton.jit
def _only(logits, groups, G):
    """-inf for groups that are not there."""
    return tl.where((groups < G)[None, :], logits, float("-inf"))


@triton.jit
def _soft(logits, groups, G, top, total, SINGLE: tl.constexpr):
    """Softmax over groups of a tile [N, G]; by the token's maximum and sum if the tile does not hold all groups."""
    logits = _only(logits, groups, G)
    if SINGLE:
        exponential = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        return exponential / tl.sum(exponential, axis=1)[:, None]
    return tl.exp(logits - top[:, None]) / total[:, None]


@triton.jit
def _merge(top, total, logits):
    """Running maximum and sum of exponentials of every token, one tile further."""
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), axis=1)
    return new_top, total


@triton.jit(do_not_specialize=["row_offset", "B"])
def group_assign_forward_kernel(
    query, key, value, seed, sums, counts, denominator, choices, assignment,
    row_offset, B, G, N, C, scale, inverse_tau, eps,
    stride_qb, stride_qg, stride_kb, stride_kn, stride_vb, stride_vn,
    HARD: tl.constexpr, GUMBEL: tl.constexpr, PLAIN: tl.constexpr, GROUP_TILES: tl.constexpr, WHOLE: tl.constexpr,
    SUBS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of one tile of tokens in every group's sums, its choices if HARD, its soft assignment if PLAIN.

    Grid (token tiles, B). WHOLE: the tile holds all tokens, ``sums`` is out [B, G, C] and ``denominator`` [B, G] is
    written; else sums [token tiles, B, G, C] and counts [token tiles, B, G] in float32, to be merged.
    """
    tile_index, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tile_index * (SUBS * BLOCK_N)
    seed_value = tl.load(seed)
    query += b * stride_qb
    key += b * stride_kb
    value += b * stride_vb
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    plain_top, plain_total = top, total
    choice = tl.zeros((BLOCK_N,), dtype=tl.int32)
    SINGLE: tl.constexpr = GROUP_TILES == 1
    if not SINGLE:
        for group_tile in tl.static_range(GROUP_TILES):
            first_group = group_tile * BLOCK_G
            groups = first_group + tl.arange(0, BLOCK_G)
            tokens = first + tl.arange(0, BLOCK_N)
            plain = scale * _products(
                key, query, tokens, groups, N, G, stride_kn, stride_qg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            logits = _noisy(plain, seed_value, row_offset + b, tokens, first_group, GUMBEL, BLOCK_N, BLOCK_G)
            logits = _only(logits * inverse_tau, groups, G)
            # Only a strictly larger logit replaces the choice, so ties go to the first group.
            better = tl.max(logits, axis=1) > top
            choice = tl.where(better, first_group + tl.argmax(logits, axis=1), choice)
            top, total = _merge(top, total, logits)
            if PLAIN:
                plain_top, plain_total = _merge(plain_top, plain_total, _only(plain * inverse_tau, groups, G))
    part = (tile_index * B + b) * G  # first row of this program's share
    # Unrolled: as a loop, everything it does not change would be kept in registers across it.
    for group_tile in tl.static_range(GROUP_TILES):
        first_group = group_tile * BLOCK_G
        groups = first_group + tl.arange(0, BLOCK_G)
        count = tl.zeros((BLOCK_G,), dtype=tl.float32)
        narrow = ()
        for sub in tl.static_range(SUBS):
            start = first + sub * BLOCK_N
            tokens = start + tl.arange(0, BLOCK_N)
            token_ok = tokens < N
            plain = scale * _products(
                key, query, tokens, groups, N, G, stride_kn, stride_qg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            if PLAIN:
                soft = _soft(plain * inverse_tau, groups, G, plain_top, plain_total, SINGLE)
                pointers = assignment + (b * G + groups)[None, :] * N + tokens[:, None]
                mask = token_ok[:, None] & (groups < G)[None, :]
                tl.store(pointers, soft.to(assignment.dtype.element_ty), mask=mask)
            logits = _noisy(plain, seed_value, row_offset + b, tokens, first_group, GUMBEL, BLOCK_N, BLOCK_G)
            logits = logits * inverse_tau
            if HARD:
                if SINGLE:
                    choice = tl.argmax(_only(logits, groups, G), axis=1)
                if group_tile == 0:
                    tl.store(choices + b * N + tokens, choice, mask=token_ok)
                weights = tl.where(groups[None, :] == choice[:, None], 1.0, 0.0)
            else:
                weights = _soft(logits, groups, G, top, total, SINGLE)
            weights = tl.where(token_ok[:, None], weights, 0.0)
            count += tl.sum(weights, axis=0)
            narrow = narrow + (weights.to(value.dtype.element_ty),)  # noqa: RUF005
        if WHOLE:
            count += eps
            tl.store(denominator + part + groups, count, mask=groups < G)
        else:
            tl.store(counts + part + groups, count, mask=groups < G)
        for block in range(C_BLOCKS):
            tile = tl.zeros((BLOCK_C, BLOCK_G), dtype=tl.float32)
            for sub in tl.static_range(SUBS):
                tokens = first + sub * BLOCK_N + tl.arange(0, BLOCK_N)
                values = _load(value, tokens, N, stride_vn, block, C, BLOCK_C, EVEN_C)
                tile = tl.dot(tl.trans(values), narrow[sub], tile, input_precision=PRECISION)
            if WHOLE:
                tile = tile / count[None, :]
            _store(sums + part * C, tl.trans(tile), groups, G, C, block, C, BLOCK_C, EVEN_C)


@triton.jit(do_not_specialize=["P", "R"])
def group_assign_merge_forward_kernel(
    sums, counts, out, denominator, P, R, C, eps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out [R, C] = sum over parts of sums [P, R, C] / (that of counts [P, R] + eps), in order.

    Grid (rows, channels).
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok = rows < R
    mask = row_ok[:, None] & (channels < C)[None, :]
    places = rows[:, None] * C + channels[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    count = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for _ in range(P):
        total += tl.load(sums + places, mask=mask, other=0.0)
        count += tl.load(counts + rows, mask=row_ok, other=0.0)
        sums += R * C
        counts += R
    count += eps
    tl.store(out + places, (total / count[:, None]).to(out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(denominator + rows, count, mask=row_ok)


@triton.jit
def _output_dots(
    grad_out, out, groups, G, C, stride_gg,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr, EVEN_C: tl.constexpr,
):  # fmt: skip
    """<grad_out_g, out_g> [BLOCK_G]: all that the division by the row sums adds to the gradient."""
    delta = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for block in range(C_BLOCKS):
        grads = _load(grad_out, groups, G, stride_gg, block, C, BLOCK_C, EVEN_C)
        results = _load(out, groups, G, C, block, C, BLOCK_C, EVEN_C)
        delta += tl.sum(grads.to(tl.float32) * results.to(tl.float32), axis=1)
    return delta


@triton.jit(do_not_specialize=["row_offset", "B"])
def group_assign_backward_kernel(
    grad_out, grad_assignment, query, key, value, out, denominator, choices, seed,
    grad_query, grad_key, grad_value,
    row_offset, B, G, N, C, scale, inverse_tau,
    stride_gb, stride_gg, stride_qb, stride_qg, stride_kb, stride_kn, stride_vb, stride_vn,
    HARD: tl.constexpr, GUMBEL: tl.constexpr, PLAIN: tl.constexpr, GROUP_TILES: tl.constexpr,
    SUBS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, C_BLOCKS: tl.constexpr,
    EVEN_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_query [token tiles, B, G, C]; grad_key, grad_value [group tiles, B, N, C]: one part a tile, to be summed.

    Grid (token tiles, B). PLAIN: the soft assignment without noise has a gradient of its own.
    """
    tile_index, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tile_index * (SUBS * BLOCK_N)
    seed_value = tl.load(seed)
    query += b * stride_qb
    key += b * stride_kb
    value += b * stride_vb
    grad_out += b * stride_gb
    out += b * G * C
    denominator += b * G
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    plain_top, plain_total = top, total
    dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    plain_dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    SINGLE: tl.constexpr = GROUP_TILES == 1
    if not SINGLE:
        # sum_g soft g = (sum_g exp(logit - top) g) / (sum_g exp(logit - top)), both over all tiles of groups
        for group_tile in tl.static_range(GROUP_TILES):
            first_group = group_tile * BLOCK_G
            groups = first_group + tl.arange(0, BLOCK_G)
            tokens = first + tl.arange(0, BLOCK_N)
            plain = scale * _products(
                key, query, tokens, groups, N, G, stride_kn, stride_qg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            logits = _noisy(plain, seed_value, row_offset + b, tokens, first_group, GUMBEL, BLOCK_N, BLOCK_G)
            logits = _only(logits * inverse_tau, groups, G)
            delta = _output_dots(grad_out, out, groups, G, C, stride_gg, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C)
            divisor = tl.load(denominator + groups, mask=groups < G, other=1.0)
            grads = _products(
                value, grad_out, tokens, groups, N, G, stride_vn, stride_gg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            grads = (grads - delta[None, :]) / divisor[None, :]
            old_top = top
            top, total = _merge(top, total, logits)
            dots = dots * tl.exp(old_top - top) + tl.sum(tl.exp(logits - top[:, None]) * grads, axis=1)
            if PLAIN:
                logits = _only(plain * inverse_tau, groups, G)
                pointers = grad_assignment + (b * G + groups)[None, :] * N + tokens[:, None]
                mask = (tokens < N)[:, None] & (groups < G)[None, :]
                grads = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                old_top = plain_top
                plain_top, plain_total = _merge(plain_top, plain_total, logits)
                plain_dots = plain_dots * tl.exp(old_top - plain_top)
                plain_dots += tl.sum(tl.exp(logits - plain_top[:, None]) * grads, axis=1)
        dots = dots / total
        if PLAIN:
            plain_dots = plain_dots / plain_total
    query_part = (tile_index * B + b) * G * C
    # Unrolled: as a loop, everything it does not change would be kept in registers across it.
    for group_tile in tl.static_range(GROUP_TILES):
        first_group = group_tile * BLOCK_G
        groups = first_group + tl.arange(0, BLOCK_G)
        delta = _output_dots(grad_out, out, groups, G, C, stride_gg, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C)
        divisor = tl.load(denominator + groups, mask=groups < G, other=1.0)
        weights = ()
        logit_grads = ()
        for sub in tl.static_range(SUBS):
            start = first + sub * BLOCK_N
            tokens = start + tl.arange(0, BLOCK_N)
            token_ok = tokens < N
            plain = scale * _products(
                key, query, tokens, groups, N, G, stride_kn, stride_qg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            logits = _noisy(plain, seed_value, row_offset + b, tokens, first_group, GUMBEL, BLOCK_N, BLOCK_G)
            soft = _soft(logits * inverse_tau, groups, G, top, total, SINGLE)
            grads = _products(
                value, grad_out, tokens, groups, N, G, stride_vn, stride_gg, C,
                BLOCK_N, BLOCK_G, BLOCK_C, C_BLOCKS, EVEN_C, PRECISION,
            )  # fmt: skip
            grads = (grads - delta[None, :]) / divisor[None, :]
            if SINGLE:
                dots = tl.sum(soft * grads, axis=1)
            grad_logits = soft * (grads - dots[:, None])
            if HARD:
                # The choice of the forward pass, so that a logit rounded otherwise here cannot tip a near tie.
                choice = tl.load(choices + b * N + tokens, mask=token_ok, other=0)
                soft = tl.where(groups[None, :] == choice[:, None], 1.0, 0.0)
            weights = weights + ((soft / divisor[None, :]).to(query.dtype.element_ty),)  # noqa: RUF005
            if PLAIN:
                pointers = grad_assignment + (b * G + groups)[None, :] * N + tokens[:, None]
                mask = token_ok[:, None] & (groups < G)[None, :]
                grads = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                soft = _soft(plain * inverse_tau, groups, G, plain_top, plain_total, SINGLE)
                if SINGLE:
                    plain_dots = tl.sum(soft * grads, axis=1)
                grad_logits += soft * (grads - plain_dots[:, None])
            # Tokens that are not there get no store, but must not reach grad_query either.
            grad_logits = tl.where(token_ok[:, None], grad_logits, 0.0)
            logit_grads = logit_grads + (grad_logits.to(query.dtype.element_ty),)  # noqa: RUF005
        token_part = (group_tile * B + b) * N * C
        for block in range(C_BLOCKS):
            right = _load(grad_out, groups, G, stride_gg, block, C, BLOCK_C, EVEN_C)
            for sub in tl.static_range(SUBS):
                tokens = first + sub * BLOCK_N + tl.arange(0, BLOCK_N)
                tile = tl.dot(weights[sub], right, input_precision=PRECISION)
                _store(grad_value + token_part, tile, tokens, N, C, block, C, BLOCK_C, EVEN_C)
        factor = scale * inverse_tau
        for block in range(C_BLOCKS):
            right = _load(query, groups, G, stride_qg, block, C, BLOCK_C, EVEN_C)
            total_tile = tl.zeros((BLOCK_C, BLOCK_G), dtype=tl.float32)  # grad_query transposed
            for sub in tl.static_range(SUBS):
                tokens = first + sub * BLOCK_N + tl.arange(0, BLOCK_N)
                tile = tl.dot(logit_grads[sub], right, input_precision=PRECISION) * factor
                _store(grad_key + token_part, tile, tokens, N, C, block, C, BLOCK_C, EVEN_C)
                keys = _load(key, tokens, N, stride_kn, block, C, BLOCK_C, EVEN_C)
                total_tile = tl.dot(tl.trans(keys), logit_grads[sub], total_tile, input_precision=PRECISION)
            tile = tl.trans(total_tile) * factor
            _store(grad_query + query_part, tile, groups, G, C, block, C, BLOCK_C, EVEN_C)
