"""The bytes of group assignment: what the interpreter counts is what ``bytes_moved`` says."""

import pytest
import torch
from interloom.kernels import group_assign
from interloom.kernels.bench.traffic import count_traffic
from interloom.kernels.group_assign.launch import bytes_moved


def _counted(call):
    with count_traffic() as traffic:
        result = call()
    assert traffic.atomic == 0
    return result, {name: kernel.moved for name, kernel in traffic.kernels.items()}


@pytest.mark.parametrize("assignment", [False, True])
@pytest.mark.parametrize(
    ("groups", "tokens", "channels", "hard", "dtype"),
    [
        (5, 20, 20, True, torch.bfloat16),
        (8, 40, 64, False, torch.float32),  # two subtiles of tokens, the last ragged
        (3, 150, 70, True, torch.float16),  # several tiles of tokens
        (20, 34, 8, False, torch.float32),  # several tiles of groups
        (33, 70, 40, True, torch.bfloat16),  # several of both
    ],
)
def test_bytes_are_as_said(groups, tokens, channels, hard, dtype, assignment):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, length, channels, generator=generator).to(dtype).requires_grad_()
        for length in (groups, tokens, tokens)
    )
    said = bytes_moved(query, key, hard=hard, return_assignment=assignment)
    options = {"hard": hard, "gumbel": True, "seed": 1, "return_assignment": assignment, "backend": "triton"}
    outputs, forward = _counted(lambda: group_assign(query, key, value, **options))
    outputs = [output for output in outputs if output is not None]
    grads = [torch.ones_like(output) for output in outputs]
    _, backward = _counted(lambda: torch.autograd.grad(outputs, (query, key, value), grads))
    assert (forward, backward) == (said.forward, said.backward)
    assert said.floor.forward < said.moved_forward
    assert said.floor.backward < said.moved_backward
