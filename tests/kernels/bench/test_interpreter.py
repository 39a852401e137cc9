"""The mended interpreter and the byte counts, against torch and hand-counted kernels."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interloom.kernels.bench.interpreter import bfloat16_to_float32, float32_to_bfloat16
from interloom.kernels.bench.traffic import count_traffic
from triton.runtime.errors import InterpreterError


@triton.jit
def _cast_kernel(source, target, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(target + offsets, tl.load(source + offsets).to(target.dtype.element_ty))


@triton.jit
def _matmul_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + inner[None, :])
    right = tl.load(b + inner[:, None] * N + columns[None, :])
    tl.store(c + rows[:, None] * N + columns[None, :], tl.dot(left, right))


@triton.jit
def _sum_bf16_kernel(source, target, N: tl.constexpr):
    tl.store(target, tl.max(tl.load(source + tl.arange(0, N)), axis=0))


@triton.jit
def _double_bf16_kernel(source, target, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(target + offsets, tl.load(source + offsets) * 2)


@triton.jit
def _strided_kernel(source, target, n, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    values = tl.load(source + offsets * stride, mask=mask, other=0.0)
    tl.store(target + offsets, values, mask=mask)
    tl.atomic_add(target + n, tl.sum(values, axis=0))


@triton.jit
def _descriptor_kernel(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    descriptor = tl.make_tensor_descriptor(source, [ROWS, COLUMNS], [COLUMNS, 1], [BLOCK, COLUMNS])
    tile = descriptor.load([tl.program_id(0) * BLOCK, 0])
    tl.store(target + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.sum(tile.to(tl.float32), axis=1))


@triton.jit
def _scalar_condition_kernel(source, target, n, N: tl.constexpr):
    offsets = tl.arange(0, N)
    mask = (offsets < 8) & (tl.load(n) > 0)
    tl.store(target + offsets, tl.load(source + offsets, mask=mask, other=-1.0), mask=mask)


def test_a_transposed_float32_product_has_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=generator), torch.randn(64, 32, generator=generator)
    product, turned = torch.empty(16, 32), torch.empty(32, 16)
    _matmul_kernel[(1,)](a, b, product, 16, 32, 64)
    _matmul_kernel[(1,)](b.T.contiguous(), a.T.contiguous(), turned, 32, 16, 64)
    assert torch.equal(product, turned.T)
    exact = a.double() @ b.double()
    assert (product - exact).abs().max() <= 64 * 2**-24 * (a.abs() @ b.abs()).max()


def _awkward_values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ties = (torch.arange(256, dtype=torch.int32) * 0x8000 + 0x3F800000).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.9999999, 3.3895314e38, 1e-40, 1e-45])
    return torch.cat([torch.randn(3832, generator=generator), ties, special])


def test_casts_round_to_nearest_even():
    values = _awkward_values()
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    _cast_kernel[(1,)](values, out, N=values.numel())
    assert torch.equal(out.view(torch.int16), values.bfloat16().view(torch.int16))
    back = torch.empty_like(values)
    _cast_kernel[(1,)](out, back, N=values.numel())
    assert torch.equal(back, out.float())
    assert np.isnan(bfloat16_to_float32(float32_to_bfloat16(np.array([np.nan], dtype=np.float32)))).all()


def test_half_casts_through_bfloat16():
    values = _awkward_values()[:4096].clamp(-6e4, 6e4).half()
    out = torch.empty(4096, dtype=torch.bfloat16)
    _cast_kernel[(1,)](values, out, N=4096)
    assert torch.equal(out, values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32(dtype):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((32, 64), (64, 16)))
    out = torch.empty(32, 16)
    _matmul_kernel[(1,)](a, b, out, M=32, N=16, K=64)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_bfloat16_arithmetic_outside_dot_raises():
    source = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="float32"):
        _double_bf16_kernel[(1,)](source, torch.empty_like(source), N=16)


@pytest.mark.parametrize("n", [0, 3])
def test_a_scalar_comparison_masks_a_tile(n):
    source, target = torch.arange(16.0), torch.full((16,), -2.0)
    _scalar_condition_kernel[(1,)](source, target, torch.tensor([n], dtype=torch.int32), N=16)
    assert torch.equal(target[: 8 * (n > 0)], source[: 8 * (n > 0)])
    assert (target[8 * (n > 0) :] == -2.0).all()


def test_traffic_counts_masked_loads_stores_and_atomics():
    source, target = torch.arange(400.0), torch.zeros(101)
    with count_traffic(sectors=True) as traffic:
        watched = traffic.watch(source)
        _strided_kernel[(4,)](source, target, 100, 4, BLOCK=32)
    kernel = traffic.kernels["_strided_kernel"]
    assert (kernel.loaded, kernel.stored, kernel.atomic) == (400, 400, 16)
    assert watched == [400, 0]
    assert traffic.moved == 816
    assert kernel.programs == 4
    # 16-byte strides put two elements into a sector; the dense side shares a sector among eight.
    aligned = source.data_ptr() % 32 == 0 and target.data_ptr() % 32 == 0
    assert not aligned or kernel.sectors == 50 + 13 + 4
    torch.testing.assert_close(target[100], source[::4].sum())


def test_traffic_counts_descriptors_and_dot_flops():
    a, b = torch.randn(32, 64), torch.randn(64, 16)
    with count_traffic() as traffic:
        _matmul_kernel[(1,)](a, b, torch.empty(32, 16), M=32, N=16, K=64)
        _descriptor_kernel[(2,)](a, torch.empty(32), ROWS=32, COLUMNS=64, BLOCK=16)
    assert traffic.flops == 2 * 32 * 64 * 16
    assert traffic.kernels["_matmul_kernel"].moved == 4 * (32 * 64 + 64 * 16 + 32 * 16)
    assert traffic.kernels["_descriptor_kernel"].moved == 4 * (32 * 64 + 32)


def test_a_sample_runs_under_its_own_indices_and_stands_for_the_grid():
    source, target = torch.arange(128.0), torch.zeros(129)
    with count_traffic(sample=lambda name, grid: [([(1, 0, 0), (3, 0, 0)], 4)]) as traffic:
        _strided_kernel[(4,)](source, target, 128, 1, BLOCK=32)
    assert (traffic.loaded, traffic.stored, traffic.atomic) == (128 * 4, 128 * 4, 4 * 4)
    assert traffic.kernels["_strided_kernel"].programs == 4
    assert torch.equal(target[32:64], source[32:64])
    assert torch.equal(target[96:128], source[96:128])
    assert not target[64:96].any()


def test_a_sample_of_unlike_programs_is_refused():
    source, target = torch.arange(100.0), torch.zeros(101)
    with (
        count_traffic(sample=lambda name, grid: [([(0, 0, 0), (3, 0, 0)], 4)]),
        pytest.raises(ValueError, match="_strided_kernel do not all do the same"),
    ):
        _strided_kernel[(4,)](source, target, 100, 1, BLOCK=32)


def test_empty_tensors_are_poisoned(poisoned_empty):
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.ones(3).new_empty(2).isnan().all()
    assert torch.empty_like(torch.ones(2, 2)).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
