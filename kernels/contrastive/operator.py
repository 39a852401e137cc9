"""The contrastive losses as one custom operator: what is summed, over which ranks, by which backend."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from ..common.backend import outside_autocast
from . import launch as contrastive_triton
from . import torch_path as contrastive_torch
from .ring import Ring, ring_length
from .torch_path import Positives


class _Problem(NamedTuple):
    """Weights of the loss sum(row_weight row_lse) + sum(column_weight column_lse) - positive_weight sum(W S)."""

    row_weight: torch.Tensor  # [M]
    column_weight: torch.Tensor  # [N], of this rank's texts
    positive_weight: float
    label_weight: torch.Tensor | None  # [N], of this rank's texts


def _blocks(backend: str) -> ModuleType:
    return contrastive_triton if backend == "triton" else contrastive_torch


def _problem(
    ring: Ring,
    image: torch.Tensor,
    text: torch.Tensor,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> _Problem:
    """The weights of the mean over both directions, all ranks counted."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    M, N = image.shape[0], text.shape[0]
    K = N // M
    images, texts = ring.total, ring.total * K
    if targets is not None:
        # Cross entropy with soft targets: a row weighs its log-sum-exp by the sum of its targets.
        row_weight = targets.sum(dim=1, dtype=dtype) / (2 * images)
        column_weight = ring.sum(targets.sum(dim=0, dtype=dtype)) / (2 * texts)
        start = ring.start(ring.rank)
        return _Problem(
            row_weight, column_weight[start : start + N].contiguous(), 0.5 / images + 0.5 / texts, None
        )
    row_weight = torch.full((M,), 0.5 / images, dtype=dtype, device=image.device)
    column_weight = torch.full((N,), 0.5 / texts, dtype=dtype, device=image.device)
    label_weight = None
    if labels is not None:
        ordered = ring.gather(labels).flatten().sort().values
        own = labels.flatten().contiguous()
        count = torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)
        label_weight = 1.0 / count.to(dtype)
    return _Problem(row_weight, column_weight, 1.0 / texts, label_weight)


def _positives(
    ring: Ring,
    source: int,
    K: int,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
    block_labels: torch.Tensor | None,
    label_weight: torch.Tensor | None,
) -> Positives:
    """What this rank's images and the texts of rank ``source`` have to do with each other."""
    if targets is not None:
        start = ring.start(source)
        return Positives("targets", targets=targets[:, start : start + ring.sizes[source]])
    if labels is not None:
        return Positives("labels", K, labels, block_labels, label_weight)
    return Positives("own" if source == ring.rank else "none", K)


@torch.library.custom_op("interloom::contrastive", mutates_args=())
@outside_autocast
def contrastive_op(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
    group_name: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss [], row log-sum-exps [M], column log-sum-exps [N], rows of each rank, int64 on the CPU).

    image [M, D], text [M * K, D], labels [M, K].
    """
    ring = Ring(group_name, image.shape[0], image.device)
    problem = _problem(ring, image, text, targets, labels)
    blocks, K = _blocks(backend), text.shape[0] // image.shape[0]
    # What this rank finds for its own texts stays; what others find travels with the block and comes home.
    row_lse, column_lse, own_lse, positive_sum = None, None, torch.empty(0), 0.0
    block, block_labels, label_weight = text, _flat(labels), problem.label_weight
    for step in range(ring.world):
        source = (ring.rank - step) % ring.world
        last = step + 1 == ring.world
        passing = (
            None if last else [ring.send_on(x, source) for x in _present(block, block_labels, label_weight)]
        )
        positives = _positives(ring, source, K, targets, labels, block_labels, label_weight)
        row_part, column_part, positive_part = blocks.block_lse(image, block, scale, positives)
        row_lse = row_part if row_lse is None else torch.logaddexp(row_lse, row_part)
        positive_sum = positive_sum + positive_part
        if step == 0:
            own_lse = column_part
        else:
            column_lse = column_part if column_lse is None else torch.logaddexp(column_lse, column_part)
            column_lse = ring.send_on(column_lse, source).wait()
        if passing is not None:
            block, block_labels, label_weight = _received(passing)
    assert row_lse is not None
    column_lse = own_lse if column_lse is None else torch.logaddexp(own_lse, column_lse)
    loss = (problem.row_weight * row_lse).sum() + (problem.column_weight * column_lse).sum()
    loss = ring.sum(loss - problem.positive_weight * positive_sum)
    sizes = torch.tensor(ring.sizes, device="cpu")
    return loss.to(torch.promote_types(image.dtype, torch.float32)), row_lse, column_lse, sizes


def _flat(labels: torch.Tensor | None) -> torch.Tensor | None:
    return None if labels is None else labels.flatten().contiguous()


def _present(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [x for x in tensors if x is not None]


def _received(passing: list) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The next block: its texts, then their labels and label weights if there are any."""
    block, *rest = [x.wait() for x in passing]
    labels, weights = rest if rest else (None, None)
    return block, labels, weights


@contrastive_op.register_fake
def _(image, text, scale, targets, labels, group_name, backend):
    return (
        image.new_empty((), dtype=torch.promote_types(image.dtype, torch.float32)),
        image.new_empty((image.shape[0],), dtype=torch.float64),
        image.new_empty((text.shape[0],), dtype=torch.float64),
        torch.empty(ring_length(group_name), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("interloom::contrastive_backward", mutates_args=())
@outside_autocast
def contrastive_backward_op(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
    row_lse: torch.Tensor,
    column_lse: torch.Tensor,
    sizes: torch.Tensor,
    group_name: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of image, text and scale. Each rank's loss holds every rank's features, hence the sums over ranks."""
    ring = Ring(group_name, sizes.tolist(), image.device)
    problem = _problem(ring, image, text, targets, labels)
    blocks, K = _blocks(backend), text.shape[0] // image.shape[0]
    factor = ring.sum(grad)
    alone = ring.world == 1
    partial_dtype = image.dtype if alone else torch.promote_types(image.dtype, torch.float32)
    grad_image, grad_text, own_text, grad_scale = None, None, torch.empty(0), 0.0
    block, block_labels, label_weight = text, _flat(labels), problem.label_weight
    block_lse, block_weight = column_lse, problem.column_weight
    for step in range(ring.world):
        source = (ring.rank - step) % ring.world
        last = step + 1 == ring.world
        travelling = (block_lse, block_weight, block, block_labels, label_weight)
        passing = [] if last else [ring.send_on(x, source) for x in _present(*travelling)]
        positives = _positives(ring, source, K, targets, labels, block_labels, label_weight)
        image_part, text_part, scale_part = blocks.block_gradients(
            image,
            block,
            scale,
            row_lse,
            block_lse,
            problem.row_weight,
            block_weight,
            problem.positive_weight,
            positives,
            factor,
            partial_dtype,
        )
        grad_image = image_part if grad_image is None else grad_image.add_(image_part)
        grad_scale = grad_scale + scale_part
        if step == 0:
            own_text = text_part
        else:
            grad_text = text_part if grad_text is None else grad_text.add_(text_part)
            grad_text = ring.send_on(grad_text, source).wait()
        if passing:
            block_lse, block_weight = passing[0].wait(), passing[1].wait()
            block, block_labels, label_weight = _received(passing[2:])
    assert grad_image is not None
    grad_text = own_text if grad_text is None else grad_text.add_(own_text)
    assert isinstance(grad_scale, torch.Tensor)
    grad_scale = (ring.sum(grad_scale) * grad).to(scale.dtype)
    return grad_image.to(image.dtype), grad_text.to(text.dtype), grad_scale


@contrastive_backward_op.register_fake
def _(grad, image, text, scale, targets, labels, row_lse, column_lse, sizes, group_name, backend):
    return image.new_empty(image.shape), text.new_empty(text.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output) -> None:
    image, text, scale, targets, labels, group_name, backend = inputs
    _, row_lse, column_lse, sizes = output
    ctx.save_for_backward(image, text, scale, targets, labels, row_lse, column_lse, sizes)
    ctx.settings = (group_name, backend)
    ctx.mark_non_differentiable(row_lse, column_lse, sizes)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    grads = contrastive_backward_op(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


contrastive_op.register_autograd(_autograd_backward, setup_context=_setup_context)
