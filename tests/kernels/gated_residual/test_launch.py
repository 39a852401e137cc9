"""The bytes of the gated residual: what the interpreter counts is what ``bytes_moved`` says, and near the floor."""

import pytest
import torch
from interloom.kernels import gated_residual, gated_residual_rms_norm
from interloom.kernels.bench.traffic import count_traffic
from interloom.kernels.common.arch import multiprocessors
from interloom.kernels.gated_residual.launch import bytes_moved, bytes_moved_rms_norm


def _counted(call):
    with count_traffic() as traffic:
        result = call()
    assert traffic.atomic == 0
    return result, {name: kernel.moved for name, kernel in traffic.kernels.items()}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "masked", "dtype"),
    [
        (128, 512, True, torch.bfloat16),
        (21, 1100, True, torch.float32),  # two blocks of channels, a ragged run of rows
        (9, 40, False, torch.float16),
        (9, 4100, True, torch.bfloat16),  # the norm's weight does not stay in registers
    ],
)
def test_bytes_are_as_said(rows, width, masked, dtype, per_channel):
    generator = torch.Generator().manual_seed(0)
    residual, update = (
        torch.randn(rows, width, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    )
    alpha = torch.randn(width if per_channel else 1, generator=generator).requires_grad_()
    weight = torch.ones(width, dtype=dtype, requires_grad=True)
    row_mask = torch.rand(rows, generator=generator) < 0.7 if masked else None
    updated = rows if row_mask is None else int(row_mask.sum())
    element, grad = residual.element_size(), torch.ones(rows, width).to(dtype)
    options = {
        "updated_rows": updated, "gates": alpha.numel(), "gate_bytes": 4, "masked": masked,
        "processors": multiprocessors(residual),
    }  # fmt: skip

    said = bytes_moved(rows, width, element, **options)
    out, forward = _counted(lambda: gated_residual(residual, update, alpha, row_mask, backend="triton"))
    _, backward = _counted(lambda: torch.autograd.grad(out, (residual, update, alpha), grad))
    assert (forward, backward) == (said.forward, said.backward)

    normed = bytes_moved_rms_norm(rows, width, element, weight_bytes=element, **options)
    outs, forward = _counted(
        lambda: gated_residual_rms_norm(residual, update, alpha, weight, row_mask, backend="triton")
    )
    inputs = (residual, update, alpha, weight)
    _, backward = _counted(lambda: torch.autograd.grad(outs, inputs, (grad, grad)))
    assert (forward, backward) == (normed.forward, normed.backward)


@pytest.mark.parametrize("gates", [1, 512])
def test_bytes_are_near_the_floor(gates):
    """At most 1.25 times the maps that must be read and written forward, 1.5 times backward."""
    rows, updated, row_bytes = 128, 88, 512 * 2
    options = {"updated_rows": updated, "gates": gates, "gate_bytes": 2, "processors": 4}
    alone = bytes_moved(rows, 512, 2, **options)
    normed = bytes_moved_rms_norm(rows, 512, 2, weight_bytes=2, **options)
    maps = row_bytes * (2 * rows + updated), row_bytes * (rows + 2 * updated)
    assert maps[0] <= alone.floor.forward <= alone.moved_forward <= 1.25 * maps[0]
    assert maps[1] <= alone.floor.backward <= alone.moved_backward <= 1.5 * maps[1]
    maps = row_bytes * (3 * rows + updated), row_bytes * (5 * rows + updated)
    assert maps[0] <= normed.floor.forward <= normed.moved_forward <= 1.25 * maps[0]
    assert maps[1] <= normed.floor.backward <= normed.moved_backward <= 1.5 * maps[1]
