"""Large contrastive batches on little memory, exactly.

A contrastive loss ties every sample of a batch to every other, so gradients of micro-batches do not add up to
the gradient of the batch: with naive accumulation the negatives do not grow. Here (after Gao et al., "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", 2021) the batch goes through the encoders twice:

1. without gradients, in micro-batches, keeping only the pooled features;
2. the objective runs once on the features of the whole batch, and its gradient at the features is kept;
3. each micro-batch is encoded again, with gradients, and that gradient is sent on from its features.

The features are cached *before* the projectors, so batch statistics too are those of the whole batch, which
implementations that cache projected features lose. The encoders must be deterministic functions of the
micro-batch: noise and DropPath are replayed from :class:`~interloom.models.noise.Noise`. Gradients then equal
those of the one big batch up to the order of summation. Cost: one more forward pass of the encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")
Features = tuple[Tensor, ...]


def backward_whole_batch(
    chunks: Sequence[Chunk],
    encode: Callable[[Chunk], Features],
    objective: Callable[..., tuple[Tensor, dict[str, Any]]],
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    before: Callable[[bool], None] = lambda last: None,
) -> dict[str, Any]:
    """Add to ``.grad`` the gradient of ``objective`` over all chunks together; return its metrics.

    Args:
        chunks: micro-batches, in order.
        encode: features of one chunk, each [rows of the chunk, ...]; called twice where there are several chunks.
        objective: called once with the features of all chunks, concatenated along the rows; returns the loss, a
            scalar, and metrics to pass on.
        backward: how a scalar is differentiated (Lightning's ``manual_backward`` scales it in float16).
        before: called before each backward pass with whether it is the last one.
    """
    if not chunks:
        raise ValueError("a step needs at least one micro-batch, none was given; check the batch size.")
    if len(chunks) == 1:
        loss, metrics = objective(*encode(chunks[0]))
        before(True)
        backward(loss)
        return metrics
    with torch.no_grad():
        encoded = [encode(chunk) for chunk in chunks]
    sizes = [features[0].shape[0] for features in encoded]
    whole = [torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True)]
    del encoded
    loss, metrics = objective(*whole)
    before(False)
    backward(loss)
    gradients = [feature.grad for feature in whole]
    start = 0
    for number, (chunk, size) in enumerate(zip(chunks, sizes, strict=True)):
        rows = slice(start, start + size)
        before(number + 1 == len(chunks))
        start += size
        reached = [
            (feature, gradient[rows])
            for feature, gradient in zip(encode(chunk), gradients, strict=True)
            if gradient is not None and feature.requires_grad  # a frozen tower takes no gradient
        ]
        if reached:
            features, upstream = zip(*reached, strict=True)
            with torch.autocast(features[0].device.type, enabled=False):
                torch.autograd.backward(features, upstream)
    return metrics
