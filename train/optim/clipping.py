"""The norm of a gradient whose parts lie on several ranks, and clipping by it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a float32 scalar, equal on every rank."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    if not shards:
        return nn.utils.get_total_norm(whole)
    # Every rank holds the whole ones: they count once.
    squares = _sum_of_squares(shards)
    dist.all_reduce(squares)
    if whole:
        squares = squares + _sum_of_squares(whole)
    return squares.sqrt().float()


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Float64, so that the sum does not depend on how many ranks it is split over."""
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.double().square().sum()


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient, or this rank's part of it, in place."""
    parts = [
        own_part(gradient)
        for gradient in (parameter.grad for parameter in parameters)
        if gradient is not None
    ]
    torch._foreach_mul_(parts, factor)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Scale gradients down to the norm ``limit`` (None: leave them); return their norm before.

    A gradient that is not finite stays as it is.
    """
    norm = gradient_norm(parameters)
    if limit is not None and torch.isfinite(norm):
        if any(isinstance(parameter.grad, DTensor) for parameter in parameters):
            scale_gradients(parameters, (limit / (norm + 1e-6)).clamp(max=1.0))
        else:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
