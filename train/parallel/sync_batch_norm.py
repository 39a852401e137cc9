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


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) over the rows of all ranks; also mean [C], variance [C] and row count [1].

    One collective each way. Every rank's loss uses every rank's rows through the statistics, so the gradient sums
    over ranks, as those of a loss over the whole batch do.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        rows, width = values.shape
        own_mean = values.sum(0) / max(rows, 1)
        # Squares around the rank's own mean: the difference of large squares and means would cancel.
        own_squares = (values - own_mean).square().sum(0)
        own = torch.cat([values.new_full((1,), rows), own_mean, own_squares])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group=group)
        counts, means, squares = torch.stack(parts).split([1, width, width], dim=1)
        total = counts.sum(0)
        # Chan, Golub & LeVeque 1979: sums of squares around several means make one around their common mean.
        mean = (counts * means).sum(0) / total
        variance = (squares + counts * (means - mean).square()).sum(0) / total
        scale = torch.rsqrt(variance + eps)
        normal = (values - mean) * scale
        ctx.save_for_backward(normal, scale, total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, total)
        return normal, mean, variance, total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        normal, scale, total = ctx.saved_tensors
        sums = torch.stack([gradient.sum(0), (gradient * normal).sum(0)])
        dist.all_reduce(sums, group=ctx.group)
        along_ones, along_normal = sums / total
        return (gradient - along_ones - normal * along_normal) * scale, None, None


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
        normalised = _Normalise.apply(input.float(), self.eps, self.group)
        assert isinstance(normalised, tuple)
        normal, mean, variance, total = normalised
        self._track(mean, variance * total / (total - 1).clamp_min(1.0))
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
