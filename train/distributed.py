"""Gradients over ranks, without a wrapper around the model.

``DistributedDataParallel`` starts an all-reduce as soon as a parameter's gradient is ready, once a forward pass. A
step with contrastive accumulation has one backward pass for the projectors and several for the encoders, so
here the gradients are averaged once, after all of them, in buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

BUCKET_ELEMENTS = 16 * 1024 * 1024


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks. Every rank must have gradients of the same parameters."""
    _, world_size = ranks()
    if world_size == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        gradient = parameter.grad
        if bucket and (size + gradient.numel() > BUCKET_ELEMENTS or gradient.dtype != bucket[0].dtype):
            _average(bucket, world_size)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        _average(bucket, world_size)


def _average(bucket: list[Tensor], world_size: int) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    flat /= world_size
    start = 0
    for gradient in bucket:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


class AveragingStrategy(DDPStrategy):
    """Lightning's process setup of DDP; the module averages its own gradients (:func:`average_gradients`)."""

    def configure_ddp(self) -> None:
        model: LightningModule | None = self.lightning_module
        assert model is not None
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
