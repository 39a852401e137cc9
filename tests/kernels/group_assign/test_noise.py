"""The noise of group assignment: known answers of Philox, Gumbel's moments, the same from Triton."""

import math

import torch
import triton
import triton.language as tl
from interloom.kernels.common.philox import gumbel_noise, gumbel_tile, philox_bits


def test_known_answer_of_philox():
    # Random123's kat_vectors for philox4x32-10 with counter and key zero.
    words = philox_bits(torch.tensor(0), torch.tensor([0]), 4, 1)
    assert words.flatten().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_moments_and_bounds_are_those_of_gumbel():
    noise = gumbel_noise(torch.tensor(1), torch.arange(256), 16, 64)
    assert abs(noise.mean().item() - 0.5772157) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    assert noise.isfinite().all()
    # P(noise > 8) = 1 - exp(-exp(-8)): the tail is there
    assert abs((noise > 8).double().mean().item() / (1 - math.exp(-math.exp(-8))) - 1) < 0.2


@triton.jit
def _write_kernel(seed, row, out, first, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    tokens = tl.arange(0, BLOCK_N)
    tile = gumbel_tile(tl.load(seed), tl.load(row), first + tokens, 16, BLOCK_N, BLOCK_G)
    tl.store(out + tl.arange(0, BLOCK_G)[None, :] * BLOCK_N + tokens[:, None], tile)


def test_a_tile_equals_the_same_part_of_the_whole():
    seed, row = torch.tensor(-123456789012), torch.tensor([2**40 + 7])
    out = torch.empty(16, 32)
    _write_kernel[(1,)](seed, row, out, 32, BLOCK_N=32, BLOCK_G=16)
    torch.testing.assert_close(out, gumbel_noise(seed, row, 40, 80)[0, 16:32, 32:64], rtol=1e-6, atol=1e-6)


def test_nearby_rows_groups_tokens_and_seeds_differ():
    noise = gumbel_noise(torch.tensor(3), torch.arange(4), 4, 8)
    assert noise.flatten().unique().numel() == noise.numel()
    assert not torch.isin(gumbel_noise(torch.tensor(4), torch.arange(4), 4, 8), noise).any()
