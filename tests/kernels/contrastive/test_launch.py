"""The bytes of the contrastive losses: what the interpreter counts is what ``bytes_moved`` says."""

import pytest
import torch
from interloom.kernels import contrastive_loss, multi_label_contrastive_loss
from interloom.kernels.bench.traffic import count_traffic
from interloom.kernels.contrastive import launch
from interloom.kernels.contrastive.launch import bytes_moved
from interloom.kernels.contrastive.torch_path import Positives


def _counted(call):
    with count_traffic() as traffic:
        result = call()
    assert traffic.atomic == 0
    return result, {name: kernel.moved for name, kernel in traffic.kernels.items()}


def _features(*shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
        .to(dtype)
        .requires_grad_()
    )


def _agree(loss, image, text, positives, **options):
    scale = torch.tensor(9.0, requires_grad=True)
    said = bytes_moved(image, text.reshape(-1, text.shape[-1]), positives)
    result, forward = _counted(lambda: loss(image, text, scale, **options, backend="triton"))
    _, backward = _counted(lambda: torch.autograd.grad(result, (image, text, scale)))
    assert (forward, backward) == (said.forward, said.backward)
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "channels"), [(70, 24), (33, 300)])
@pytest.mark.parametrize("kind", ["own", "labels", "targets"])
def test_bytes_are_as_said(kind, images, channels, dtype):
    image, text = (_features(images, channels, dtype=dtype) for _ in range(2))
    targets = {
        "own": None, "labels": torch.arange(images) // 2, "targets": torch.eye(images, dtype=torch.float16),
    }[kind]  # fmt: skip
    _agree(contrastive_loss, image, text, Positives(kind, targets=targets), targets=targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["own", "labels"])
def test_bytes_with_several_texts_an_image(kind, dtype):
    image, text = _features(37, 20, dtype=dtype), _features(37, 3, 20, dtype=dtype)
    labels = torch.randint(0, 40, (37, 3)) if kind == "labels" else None
    _agree(multi_label_contrastive_loss, image, text, Positives(kind, 3), labels=labels)


def test_bytes_of_several_bands_of_row_blocks(monkeypatch):
    monkeypatch.setattr(launch, "_BAND", 1)
    image, text = (_features(70, 16, dtype=torch.bfloat16) for _ in range(2))
    _agree(contrastive_loss, image, text, Positives("own"))


def test_bytes_are_near_the_floor():
    """With sixteen spans and more the statistics are what is left beside the features."""
    image, text = (torch.empty(4096, 256, dtype=torch.bfloat16, device="meta") for _ in range(2))
    said = bytes_moved(image, text, Positives("own"))
    assert said.floor.forward <= said.moved_forward <= 1.25 * said.floor.forward
    assert said.floor.backward <= said.moved_backward <= 1.5 * said.floor.backward
