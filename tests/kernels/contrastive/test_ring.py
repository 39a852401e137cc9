"""The contrastive losses over two ranks equal the gathered loss, gradients included."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

SIZES = [3, 5]  # ranks need not hold equally many
CHANNELS, TEXTS = 6, 2


def _whole(mode, dtype):
    """(image, text, options) of all ranks together."""
    generator = torch.Generator().manual_seed(0)
    total = sum(SIZES)
    image = F.normalize(torch.randn(total, CHANNELS, generator=generator), dim=-1).to(dtype)
    text = F.normalize(torch.randn(total, TEXTS, CHANNELS, generator=generator), dim=-1).to(dtype)
    labels = torch.randint(0, 4, (total, TEXTS), generator=generator)
    soft = torch.rand(total, total, generator=generator).to(dtype)
    if mode.startswith("multi"):
        return image, text, {} if mode == "multi" else {"labels": labels}
    options = {"plain": {}, "identities": {"targets": labels[:, 0]}, "targets": {"targets": soft}}[mode]
    return image, text[:, 0].contiguous(), options


def _work(rank: int, store: str, results: str) -> None:
    from interloom.kernels import contrastive_loss, multi_label_contrastive_loss
    from interloom.kernels.bench.interpreter import patched_interpreter

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(SIZES))
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    found = {}
    cases = [(mode, dtype, "torch") for mode in MODES for dtype in (torch.float64, torch.float32)]
    for mode, dtype, backend in [*cases, ("multi-identities", torch.float32, "triton")]:
        image, text, options = _whole(mode, dtype)
        leaves = [image[mine].clone().requires_grad_(), text[mine].clone().requires_grad_()]
        scale = torch.tensor(10.0, dtype=dtype, requires_grad=True)
        operation = multi_label_contrastive_loss if mode.startswith("multi") else contrastive_loss
        options = {name: x[mine] for name, x in options.items()}
        with patched_interpreter():  # a process of its own has not the session's
            loss = operation(*leaves, scale, **options, group=dist.group.WORLD, backend=backend)
            loss.backward()
        found[mode, dtype, backend] = (loss.detach(), *(x.grad for x in leaves), scale.grad)
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


MODES = ["plain", "identities", "targets", "multi", "multi-identities"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ring")
    before = os.environ.get("TRITON_INTERPRET")
    assert before == "1"
    mp.spawn(_work, (str(folder / "store"), str(folder)), nprocs=len(SIZES))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(len(SIZES))]


# The Triton kernels take no float64.
CASES = [(mode, "torch", dtype) for mode in MODES for dtype in (torch.float64, torch.float32)]


@pytest.mark.parametrize(
    ("mode", "backend", "dtype"), [*CASES, ("multi-identities", "triton", torch.float32)], ids=str
)
def test_ring_equals_gathered(found, mode, backend, dtype):
    from interloom.kernels import contrastive_loss_reference, multi_label_contrastive_loss_reference

    image, text, options = _whole(mode, torch.float64)
    leaves = [x.requires_grad_() for x in (image, text)] + [
        torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    ]
    reference = (
        multi_label_contrastive_loss_reference if mode.startswith("multi") else contrastive_loss_reference
    )
    expected = reference(*leaves, **options)
    grads = torch.autograd.grad(expected, leaves)
    tolerance = {"rtol": 1e-6, "atol": 1e-6 if dtype == torch.float32 else 1e-12}
    for rank, results in enumerate(found):
        loss, image_grad, text_grad, scale_grad = (x.double() for x in results[mode, dtype, backend])
        mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
        torch.testing.assert_close(loss, expected.detach(), **tolerance)
        # Every rank's loss holds every rank's features: averaging over ranks gives the gradient of the one loss.
        torch.testing.assert_close(image_grad / len(SIZES), grads[0][mine], **tolerance)
        torch.testing.assert_close(text_grad / len(SIZES), grads[1][mine], **tolerance)
        torch.testing.assert_close(scale_grad, grads[2], **tolerance)
