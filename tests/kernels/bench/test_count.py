"""Counts of bytes at the model shapes: against the floor, against hand counts, and against running everything."""

import json
import subprocess
import sys

import pytest
import torch
from interloom.kernels.bench.count import Count, counting_environment, sampler
from interloom.kernels.bench.torch_traffic import TorchTraffic

# One of each kind; the whole sweep is `interloom bench kernels`.
CASES = [
    ("gated_cross_attention", "IDEFICS-9B"),
    ("gated_residual_rms_norm", "IDEFICS-9B"),
    ("group_assign", "GroupViT-S stage 1"),
    ("contrastive_loss", "batch 16,384"),  # sampled; batch 4,096 is run whole and takes longer
]


def _count(operation: str, model: str) -> list[Count]:
    command = [sys.executable, "-m", "interloom.kernels.bench.count", operation, model, "sm_90"]
    run = subprocess.run(command, env=counting_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [Count(**json.loads(line)) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "model"), CASES)
def test_bytes_are_near_the_floor_and_below_eager(operation, model):
    counts = [count for count in _count(operation, model) if count.operation == operation]
    assert [count.pass_ for count in counts] == ["forward", "backward"]
    for count, limit in zip(counts, (1.25, 1.5), strict=True):
        assert 1.0 <= count.moved / count.floor <= limit, count
        assert count.moved < count.eager, count
    if operation == "gated_cross_attention":
        # One image a token: of the dense work for N = 8 images an eighth, and at most 15 % more.
        assert counts[0].flops <= 1.15 / 8 * counts[0].dense


def test_sampler_stands_for_the_whole_grid():
    for copies, grid in [(None, (512, 2, 1)), (32, (36 * 32, 1, 1)), (8, (4, 8, 8))]:
        sample = sampler(copies)("kernel", grid)
        assert sum(population for _, population in sample) == grid[0] * grid[1] * grid[2]
        programs = [program for representatives, _ in sample for program in representatives]
        assert len(set(programs)) == len(programs)
        assert all(0 <= i < extent for program in programs for i, extent in zip(program, grid, strict=True))
    assert sampler(None)("kernel", (64, 1, 1)) is None


def test_torch_traffic_counts_operands_and_results_once():
    a, b = torch.empty(64, 32, device="meta"), torch.empty(32, 16, device="meta")
    with TorchTraffic() as traffic:
        product = a @ b
    assert traffic.moved == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    with TorchTraffic() as traffic:
        product.t().view(16, 64)[:4]  # views move nothing
    assert traffic.moved == 0
    with TorchTraffic() as traffic:
        product.add_(b[0].expand(64, 16))
    assert traffic.moved == 4 * (2 * 64 * 16 + 32 * 16)


def test_torch_traffic_sees_inside_our_operations():
    from interloom.kernels import gated_residual

    residual, update, alpha = torch.randn(2, 8, 64), torch.randn(2, 8, 64), torch.ones(1)
    with TorchTraffic() as traffic:
        gated_residual(residual, update, alpha, backend="torch")
    assert traffic.moved >= 3 * 4 * residual.numel()
