"""How often a kernel would be compiled while batches differ, by Triton's own keys; and the device it is launched on."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from interloom.kernels.bench.ahead_of_time import compile_environment
from interloom.kernels.bench.device_time import tiny_sizes
from interloom.kernels.bench.operation import Maker, gradients_of, output_gradients, outputs_of
from interloom.kernels.bench.operations import OPERATIONS
from interloom.kernels.common import launch as _launch

# 200 micro-batches as training brings them: tokens, images and rows differ in every one, widths do not.
MICRO_BATCHES = """
import json, random, sys
import torch
from interloom.kernels import gated_cross_attention, gated_residual, gated_residual_rms_norm, group_assign
from interloom.kernels.bench.ahead_of_time import collect_variants

torch.set_num_threads(1)
HEADS, WIDTH, LENGTH, CHANNELS = 2, 32, 16, 64

def empty(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

def back(out):
    torch.autograd.grad(out, leaves, torch.ones_like(out))

draw = random.Random(0)
with collect_variants("sm_90") as found:
    for step in range(int(sys.argv[1])):
        tokens, images = draw.choice([1, draw.randrange(1, 600), 16 * draw.randrange(1, 40)]), draw.randrange(1, 150)
        query = empty(1, tokens, HEADS, WIDTH)
        keys = [empty(1, images * LENGTH, HEADS, WIDTH) for _ in range(2)]
        leaves = [query, *keys]
        index = torch.randint(-1, images, (1, tokens))
        several = index[..., None] >= torch.arange(images)
        for mask in (index, several):
            out = gated_cross_attention(
                *(x.transpose(1, 2) for x in leaves), mask, image_length=LENGTH, backend="triton"
            )
            back(out)
        leaves = [empty(1, tokens, CHANNELS), empty(1, tokens, CHANNELS), torch.ones(1, requires_grad=True)]
        back(gated_residual(*leaves, backend="triton"))
        leaves.append(torch.ones(CHANNELS, requires_grad=True))
        back(gated_residual_rms_norm(*leaves, backend="triton")[1])
        leaves = [empty(draw.randrange(1, 40), n, WIDTH) for n in (8, 40, 40)][:1]
        leaves += [empty(len(leaves[0]), 40, WIDTH) for _ in range(2)]
        offset = draw.randrange(1 << 40)
        back(group_assign(*leaves, gumbel=True, seed=torch.tensor(1), row_offset=offset, backend="triton")[0])
print(json.dumps({name: len(keys) for name, keys in found.items()}))
"""


def test_few_variants_of_a_kernel_in_200_random_micro_batches():
    run = subprocess.run(
        [sys.executable, "-c", MICRO_BATCHES, "200"],
        env=compile_environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert {
        "gated_cross_attention_one_forward_kernel",
        "gated_cross_attention_one_backward_kernel",
        "gated_cross_attention_forward_kernel",
        "gated_cross_attention_backward_query_kernel",
        "gated_cross_attention_backward_key_value_kernel",
        "gated_residual_forward_kernel",
        "gated_residual_rms_norm_backward_kernel",
        "group_assign_forward_kernel",
        "group_assign_backward_kernel",
    } <= counts.keys()
    assert {name: count for name, count in counts.items() if count > 3} == {}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_launch_is_under_the_device_of_its_tensors(operation, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    within, launched = [], []

    @contextmanager
    def guard(tensor):
        within.append(tensor.device)
        yield
        within.pop()

    launch = GridExecutor.__call__

    def watched(self, *args, **kwargs):
        launched.append(bool(within))
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(_launch, "device_guard", guard)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    inputs = operation.make(tiny_sizes(operation, next(iter(operation.models))), Maker(torch.float16))
    outputs = outputs_of(operation.call(inputs, "triton")())
    gradients_of(operation, inputs, outputs, output_gradients(outputs))
    assert len(launched) >= 2
    assert all(launched)


def test_the_guard_is_of_the_device_of_the_tensor(monkeypatch):
    entered = []

    class Elsewhere:
        device = torch.device("cuda", 1)

    monkeypatch.setattr(
        torch.cuda, "device", lambda device: entered.append(device) or contextmanager(iter)([0])
    )
    _launch.device_guard(Elsewhere())
    assert entered == [torch.device("cuda", 1)]
    with _launch.device_guard(torch.zeros(1)):
        pass
    assert len(entered) == 1
