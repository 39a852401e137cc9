"""Where PyTorch stands in for the kernels: wide heads and old GPUs, each said once."""

import logging
from functools import partial

import pytest
import torch
from interloom.kernels import gated_cross_attention, gated_cross_attention_reference
from interloom.kernels.common import backend as _backend


class OnAGpu:
    device = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh():
    _backend.fall_back.cache_clear()
    _backend._capability.cache_clear()
    yield
    _backend.fall_back.cache_clear()
    _backend._capability.cache_clear()


def test_head_dims_above_128_take_pytorch_and_say_so_once(caplog, monkeypatch):
    from interloom.kernels.cross_attention import launch as cross_attention_triton

    monkeypatch.delattr(cross_attention_triton, "forward")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, n, 160, generator=generator).requires_grad_() for n in (6, 4, 4))
    index = torch.tensor([[-1, 0, 0, 1, 1, 1]])
    with caplog.at_level(logging.WARNING, "interloom.kernels"):
        for _ in range(3):
            out = gated_cross_attention(query, key, value, index, image_length=2, backend="triton")
    assert [record.getMessage() for record in caplog.records] == [
        "PyTorch stands in for the Triton kernels: gated_cross_attention was given a head dim of 160 and they take up "
        "to 128."
    ]
    expected = gated_cross_attention_reference(query, key, value, index, image_length=2)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("capability", "backend"), [((7, 5), "torch"), ((7, 0), "torch"), ((8, 0), "triton"), ((12, 0), "triton")]
)
@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_gpus_older_than_capability_8_take_pytorch(caplog, monkeypatch, capability, backend, asked):
    monkeypatch.delenv("INTERLOOM_KERNELS", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.WARNING, "interloom.kernels"):
        assert [_backend.resolve_backend(asked, OnAGpu()) for _ in range(3)] == [backend] * 3
    assert len(caplog.records) == (backend == "torch")
    assert all("needs 8.0" in r.getMessage() or "need 8.0" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    ("capability", "column"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
     ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_120")],
)  # fmt: skip
def test_every_generation_has_launches(monkeypatch, capability, column):
    from interloom.kernels.common import arch as _arch
    from interloom.kernels.common import launch as _launch
    from interloom.kernels.contrastive import launch as contrastive_triton
    from interloom.kernels.cross_attention import launch as cross_attention_triton
    from interloom.kernels.group_assign import launch as group_assign_triton

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _arch._device_architecture.cache_clear()
    try:
        assert _arch.architecture(OnAGpu()) == column
        for module in (contrastive_triton, cross_attention_triton, group_assign_triton):
            for name in ("FORWARD", "BACKWARD", "ONE_FORWARD", "ONE_BACKWARD", "QUERY_SEVERAL", "KEY_VALUE"):
                table = getattr(module, name, None)
                if table is not None:
                    shared = "sm_86" if "sm_86" in table else "sm_80"
                    wanted = table.get(column, table[shared])
                    assert _launch.launch_column(table, OnAGpu()) == wanted
    finally:
        _arch._device_architecture.cache_clear()


def test_float64_is_for_checking_in_every_operation(monkeypatch):
    """Asked for by nobody, PyTorch computes it, whatever the environment prefers; asked for by name, Triton refuses."""
    from interloom import kernels

    monkeypatch.setenv("INTERLOOM_KERNELS", "triton")
    wide = partial(torch.ones, dtype=torch.float64)
    maps, features, scale = wide(1, 2, 4), wide(2, 4), wide(())
    calls = {
        "query": [
            lambda **kw: kernels.group_assign(maps, maps, maps, **kw),
            lambda **kw: kernels.gated_cross_attention(
                *(maps[None],) * 3, torch.zeros(1, 2).int(), image_length=2, **kw
            ),
        ],
        "residual": [
            lambda **kw: kernels.gated_residual(maps, maps, wide(1), **kw),
            lambda **kw: kernels.gated_residual_rms_norm(maps, maps, wide(1), wide(4), **kw),
        ],
        "image": [lambda **kw: kernels.contrastive_loss(features, features, scale, **kw)],
    }
    for name, operations in calls.items():
        for operation in operations:
            operation()
            with pytest.raises(ValueError, match=f"{name} is float64"):
                operation(backend="triton")
