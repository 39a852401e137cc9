"""Counter-based Gumbel noise: the same bits from PyTorch on any device and from inside a Triton kernel.

Element (row, g, n) of the noise is a function of ``(seed, row, g, n)`` alone, whatever tile, launch, batch split
or machine computes it: that is what lets a backward kernel remake the noise instead of storing it, and what keeps
a run the same on any number of ranks.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key ``seed`` (64 bits)
and counter ``(n, g // 4, row's low word, row's high word)``; its four outputs serve groups ``4 (g // 4) + 0..3``.
The integer part is exact, so PyTorch and Triton agree bit for bit; the logarithms agree to rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_UNIFORM_SCALE = 4.6566127342e-10  # the largest float32 whose product with 2**31 - 1 stays below 1


def philox_bits(seed: torch.Tensor, rows: torch.Tensor, groups: int, tokens: int) -> torch.Tensor:
    """Random 32-bit words [R, groups, tokens] as int64 in [0, 2**32) for the rows ``rows`` [R] (int64).

    ``seed`` is an int64 tensor of one element on the device of ``rows``.
    """
    device = rows.device
    seed = seed.reshape(())
    key_0, key_1 = seed & _MASK, (seed >> 32) & _MASK
    c0 = torch.arange(tokens, device=device).view(1, tokens, 1)
    c1 = torch.arange((groups + 3) // 4, device=device).view(1, 1, -1)
    c2 = (rows & _MASK).view(-1, 1, 1)
    c3 = ((rows >> 32) & _MASK).view(-1, 1, 1)
    for _ in range(10):
        # The product wraps in int64, but its 64 bits are those of the unsigned product.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = (
            ((product_b >> 32) & _MASK) ^ (c1 ^ key_0),
            ((product_a >> 32) & _MASK) ^ (c3 ^ key_1),
        )
        c1, c3 = product_b & _MASK, product_a & _MASK
        key_0, key_1 = (key_0 + _KEY_A) & _MASK, (key_1 + _KEY_B) & _MASK
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)  # [R, N, groups / 4, 4]
    return words.flatten(2)[..., :groups].mT


def gumbel_noise(seed: torch.Tensor, rows: torch.Tensor, groups: int, tokens: int) -> torch.Tensor:
    """Standard Gumbel noise [R, groups, tokens] in float32 for the rows ``rows`` [R] (int64).

    ``-log(-log(1 - u))`` with the tail near u = 0 by series: ``-log(-log(u))`` would cap the noise at 16.6 and
    quantise the winning tail, because float32 has a spacing of 2**-24 near 1. ``u`` is clamped to 2**-31, since a
    uniform number of exactly zero would give infinity.
    """
    words = philox_bits(seed, rows, groups, tokens)
    # int32 two's complement x, folded to x >= 0 (-x - 1 = ~x), as tl.rand does.
    signed = torch.where(words > 0x7FFFFFFF, _MASK - words, words)
    uniform = (signed.float() * _UNIFORM_SCALE).clamp_(min=_UNIFORM_SCALE)
    series = uniform * (1 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    exponential = torch.where(uniform < 1e-3, series, -torch.log(1 - uniform))
    return -torch.log(exponential)


@triton.jit
def gumbel_tile(seed, row, tokens, first_group, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """The same noise for a tile of tokens and groups, [BLOCK_N, BLOCK_G], transposed.

    ``seed`` and ``row`` are int64 scalars, ``tokens`` [BLOCK_N] indices, ``first_group`` a multiple of four.
    """
    quads = first_group // 4 + tl.arange(0, BLOCK_G // 4)
    zero = tl.zeros((BLOCK_N, BLOCK_G // 4), dtype=tl.uint32)
    c0 = zero + tokens[:, None].to(tl.uint32)
    c1 = zero + quads[None, :].to(tl.uint32)
    c2 = zero + (row & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    # Group 4 q + 2 i + j takes word 2 i + j: [N, G/4] four times -> [N, G/4, i, j] -> [N, G]
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_G))
    signed = words.to(tl.int32, bitcast=True)
    signed = tl.where(signed < 0, -signed - 1, signed)
    uniform = tl.maximum(signed.to(tl.float32) * 4.6566127342e-10, 4.6566127342e-10)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    exponential = tl.where(uniform < 1e-3, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)
