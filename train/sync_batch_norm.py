"""Batch normalisation over the samples of all ranks, on any device.

``torch.nn.SyncBatchNorm`` raises on CPU tensors. This layer has its state-dict names and its result; the sums it
needs are all-reduced differentiably, so gradients too are those of the whole batch on one device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum that every rank uses is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _all_reduce_sum(value: Tensor, group: Any) -> Tensor:
    total = _AllReduceSum.apply(value, group)
    assert isinstance(total, Tensor)
    return total


class SyncBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` for [N, C] whose statistics in training span all ranks of ``group`` (None: all)."""

    group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            return self._alone(input)
        if input.dim() != 2:
            raise ValueError(f"SyncBatchNorm1d takes [N, C], given {list(input.shape)}; flatten the input.")
        values = input.float()
        count = values.new_full((1,), values.shape[0])
        sums = _all_reduce_sum(torch.cat([values.sum(0), count]), self.group)
        total = sums[-1].detach()
        centred = values - sums[:-1] / total
        # A second sum, of squares around the mean: the difference of large squares and means would cancel.
        variance = _all_reduce_sum(centred.square().sum(0), self.group) / total
        normal = centred * torch.rsqrt(variance + self.eps)
        self._track(sums[:-1].detach() / total, variance.detach() * total / (total - 1).clamp_min(1.0))
        if self.weight is not None:
            normal = normal * self.weight.float() + self.bias.float()
        return normal.to(input.dtype)

    def _alone(self, input: Tensor) -> Tensor:
        """The same on one rank, by PyTorch's own operation."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return super().forward(input)
        self.num_batches_tracked.add_(1)
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        output = F.batch_norm(
            input, mean, variance, self.weight, self.bias, True, self._weight_of_new(), self.eps
        )
        self._keep(mean, variance)
        return output

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = self._weight_of_new()
        self._keep(
            torch.lerp(self.running_mean, mean.to(self.running_mean.dtype), weight),
            torch.lerp(self.running_var, unbiased.to(self.running_var.dtype), weight),
        )

    def _weight_of_new(self) -> float:
        """What one batch counts in the running statistics; without a momentum all batches count alike."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return 1.0 / float(self.num_batches_tracked)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        # A step without finite activations is skipped; it must not stay in the statistics either.
        for buffer, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert buffer is not None
            buffer.copy_(torch.where(torch.isfinite(value), value, buffer))


def synchronise_batch_norm(module: nn.Module, group: Any = None) -> nn.Module:
    """Replace every ``nn.BatchNorm1d`` inside ``module`` by :class:`SyncBatchNorm1d`, in place.

    Parameters and buffers stay the same objects.
    """
    for child in module.modules():
        if type(child) is nn.BatchNorm1d:
            child.__class__ = SyncBatchNorm1d
            child.group = group
    return module
