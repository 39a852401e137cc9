"""Contrastive losses over all pairs of a batch, in both directions, without the matrix of similarities.

With S = logit_scale * image text^T [M, N], the loss is the mean of two cross entropies, of the rows (which text
belongs to this image) and of the columns (which image to this text):

    loss = 1/2 [ mean_i ( lse_j S[i, j] - sum_j T[i, j] S[i, j] ) + mean_j ( lse_i S[i, j] - sum_i U[i, j] S[i, j] ) ]

with targets T of the rows and U of the columns. Radford et al., "Learning transferable visual models from natural
language supervision", ICML 2021; with K texts an image, Xu et al., "GroupViT", CVPR 2022, equations 9 and 10.

Cost. FLOPs: 2 M N D forward, 6 M N D backward (the similarity again, then each gradient). Memory: the inputs, the
gradients and a fixed number of floats per row and column; the tiles of S never leave the chip (on a CPU, the
cache).

Across ranks (``group``): every rank holds its own M images and texts, and the loss is that of all of them
together, the same number on every rank. Its gradient is what gathering the features with a differentiable
all-gather and computing the whole loss on every rank would give: a rank's features receive the **sum** over
ranks of the derivative of every rank's loss, that is world size times the derivative of the one global loss, and
``logit_scale`` receives its full derivative on every rank. Averaging parameter gradients over ranks, as
DistributedDataParallel does, then yields exactly the gradient of the global mean loss; a trainer that sums gradients
must divide by the world size first. Forward and backward are collective: every rank of the group calls both.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..common.backend import autocast_inputs, backend_for, outside_autocast, refuse_forward_mode
from . import launch, torch_path
from .ring import Ring, ring_length
from .torch_path import Positives

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def contrastive_loss_reference(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain definition of :func:`contrastive_loss` on one rank, in float32 (float64 for float64 inputs)."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    logits = logit_scale.to(dtype).reshape(()) * (image.to(dtype) @ text.to(dtype).T)
    if targets is None:
        targets = torch.eye(image.shape[0], dtype=dtype, device=image.device)
    elif not targets.is_floating_point():
        same = (targets[:, None] == targets[None, :]).to(dtype)
        targets = same / same.sum(dim=1, keepdim=True)
    targets = targets.to(dtype)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


def multi_label_contrastive_loss_reference(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The plain definition of :func:`multi_label_contrastive_loss` on one rank, in float32 (or float64)."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    M, K, D = text.shape
    logits = logit_scale.to(dtype).reshape(()) * (image.to(dtype) @ text.to(dtype).reshape(M * K, D).T)
    if labels is None:
        labels = torch.arange(M * K, device=image.device).view(M, K)
    flat = labels.flatten()
    copies = (flat[:, None] == flat[None, :]).sum(dim=1)  # texts that carry the label of text j
    shared = (labels[:, :, None] == flat).sum(dim=1).to(dtype) / copies  # [M, M * K]
    return (F.cross_entropy(logits, shared / K) + F.cross_entropy(logits.T, shared.T)) / 2


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Symmetric InfoNCE between M images and their M texts.

    Args:
        image, text: Features, L2-normalised by the caller: [M, D].
        logit_scale: The multiplier of the cosine similarity itself (exp already taken), one element; it receives
            its gradient.
        targets: What is right, if not simply one's own text. Either float [M, M] (across ranks [M, sum of M], the
            columns in rank order): soft targets of image i over the texts, used as they are for the rows and
            transposed for the columns, like ``F.cross_entropy`` with probabilities; or int64 [M]: an identity per
            pair, and all pairs of equal identity, on whatever rank, are positives that share the mass equally.
            Targets get no gradient.
        group: Process group whose ranks pool their features (see the module's notes on gradients); ``None`` keeps
            to this rank, even if torch.distributed is initialised.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        The mean loss, a float32 scalar (float64 for float64 features). Under autocast the features are cast to the
        autocast dtype; sums are taken in float32 all the same.

    Raises:
        ValueError: An argument has the wrong shape, dtype or device; the message names it.
    """
    image, text = autocast_inputs(image, text)
    _check_pair(image, text, logit_scale)
    if text.shape != image.shape:
        raise ValueError(f"text has shape {tuple(text.shape)}; expected that of image, {tuple(image.shape)}.")
    labels = None
    if targets is not None:
        _check_targets(targets, image, group)
        if not targets.is_floating_point():
            targets, labels = None, targets[:, None]
    return _loss("contrastive_loss", image, text, logit_scale, targets, labels, group, backend)


def multi_label_contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    labels: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """InfoNCE between M images and K texts of each: 1/K on each own text, and from every text to its own image.

    Args:
        image: Features, L2-normalised by the caller: [M, D].
        text: Features of K texts an image, likewise: [M, K, D].
        logit_scale: The multiplier of the cosine similarity itself, one element; it receives its gradient.
        labels: Identity of every text, int64 [M, K]. Texts of equal identity, on whatever rank, share the mass of
            their positives equally instead of counting as each other's negatives; an image's target for such a text
            grows with how many of the copies are its own. Off by default, as in the paper.
        group, backend: As in :func:`contrastive_loss`.

    Returns:
        The mean of both directions, a float32 scalar (float64 for float64 features).

    Raises:
        ValueError: An argument has the wrong shape, dtype or device; the message names it.
    """
    image, text = autocast_inputs(image, text)
    _check_pair(image, text, logit_scale)
    if text.dim() != 3 or text.shape[0] != image.shape[0] or text.shape[2] != image.shape[1]:
        M, D = image.shape
        raise ValueError(f"text has shape {tuple(text.shape)}; expected [{M}, K, {D}] to go with image.")
    if text.shape[1] == 0:
        raise ValueError(f"text has shape {tuple(text.shape)}; give at least one text an image.")
    if labels is not None:
        if labels.shape != text.shape[:2] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected int64 {tuple(text.shape[:2])}."
            )
        _check_device("labels", labels, image)
    text = text.flatten(0, 1)
    return _loss("multi_label_contrastive_loss", image, text, logit_scale, None, labels, group, backend)


def _loss(
    name: str,
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
    group: dist.ProcessGroup | None,
    backend: str,
) -> torch.Tensor:
    resolved = backend_for(backend, "image", image)
    refuse_forward_mode(name, image, text, logit_scale)
    scale = logit_scale.reshape(()).to(torch.promote_types(image.dtype, torch.float32))
    group_name = group.group_name if group is not None else ""
    return _contrastive(image, text, scale, targets, labels, group_name, resolved)[0]


def _check_device(name: str, tensor: torch.Tensor, image: torch.Tensor) -> None:
    if tensor.device != image.device:
        raise ValueError(f"{name} is on {tensor.device}, image on {image.device}; move them to one device.")


def _check_pair(image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor) -> None:
    if image.dim() != 2 or 0 in image.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [M, D] with at least one image.")
    if image.dtype not in _DTYPES:
        raise ValueError(f"image has dtype {image.dtype}; expected float32, float16, bfloat16 or float64.")
    if text.dtype != image.dtype:
        raise ValueError(f"text has dtype {text.dtype}, image {image.dtype}; give them the same dtype.")
    _check_device("text", text, image)
    if not isinstance(logit_scale, torch.Tensor):
        raise ValueError(f"logit_scale is a {type(logit_scale).__name__}; give a tensor of one element.")
    if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        raise ValueError(
            f"logit_scale is {logit_scale.dtype} of shape {tuple(logit_scale.shape)}; expected one float."
        )
    _check_device("logit_scale", logit_scale, image)


def _check_targets(targets: torch.Tensor, image: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    M = image.shape[0]
    _check_device("targets", targets, image)
    if targets.is_floating_point():
        alone = group is None
        if targets.dim() != 2 or targets.shape[0] != M or (alone and targets.shape[1] != M):
            expected = f"[{M}, {M}]" if alone else f"[{M}, images of all ranks]"
            raise ValueError(f"targets has shape {tuple(targets.shape)}; expected soft targets {expected}.")
    elif targets.dtype != torch.int64 or targets.shape != (M,):
        raise ValueError(
            f"targets is {targets.dtype} of shape {tuple(targets.shape)}; expected float soft targets or int64 [{M}]."
        )


class _Problem(NamedTuple):
    """Weights of the loss: of the log-sum-exps of rows and columns, less those of the positives.

    sum(row_weight row_log_sum) + sum(column_weight column_log_sum) - positive_weight sum(W S)
    """

    row_weight: torch.Tensor  # [M]
    column_weight: torch.Tensor  # [N], of this rank's texts
    positive_weight: float
    label_weight: torch.Tensor | None  # [N], of this rank's texts


def _blocks(backend: str) -> ModuleType:
    return launch if backend == "triton" else torch_path


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
def _contrastive(
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
    row_log_sum, column_log_sum, own_log_sum, positive_sum = None, None, torch.empty(0), 0.0
    block, block_labels, label_weight = text, _flat(labels), problem.label_weight
    for step in range(ring.world):
        source = (ring.rank - step) % ring.world
        last = step + 1 == ring.world
        travelling = _present(block, block_labels, label_weight)
        passing = None if last else [ring.send_on(x, source) for x in travelling]
        positives = _positives(ring, source, K, targets, labels, block_labels, label_weight)
        row_part, column_part, positive_part = blocks.block_log_sum_exps(image, block, scale, positives)
        row_log_sum = row_part if row_log_sum is None else torch.logaddexp(row_log_sum, row_part)
        positive_sum = positive_sum + positive_part
        if step == 0:
            own_log_sum = column_part
        else:
            column_log_sum = (
                column_part if column_log_sum is None else torch.logaddexp(column_log_sum, column_part)
            )
            column_log_sum = ring.send_on(column_log_sum, source).wait()
        if passing is not None:
            block, block_labels, label_weight = _received(passing)
    assert row_log_sum is not None
    column_log_sum = own_log_sum if column_log_sum is None else torch.logaddexp(own_log_sum, column_log_sum)
    loss = (problem.row_weight * row_log_sum).sum() + (problem.column_weight * column_log_sum).sum()
    loss = ring.sum(loss - problem.positive_weight * positive_sum)
    sizes = torch.tensor(ring.sizes, device="cpu")
    return loss.to(torch.promote_types(image.dtype, torch.float32)), row_log_sum, column_log_sum, sizes


def _flat(labels: torch.Tensor | None) -> torch.Tensor | None:
    return None if labels is None else labels.flatten().contiguous()


def _present(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [x for x in tensors if x is not None]


def _received(passing: list) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The next block: its texts, then their labels and label weights if there are any."""
    block, *rest = [x.wait() for x in passing]
    labels, weights = rest if rest else (None, None)
    return block, labels, weights


@_contrastive.register_fake
def _(image, text, scale, targets, labels, group_name, backend):
    return (
        image.new_empty((), dtype=torch.promote_types(image.dtype, torch.float32)),
        image.new_empty((image.shape[0],), dtype=torch.float64),
        image.new_empty((text.shape[0],), dtype=torch.float64),
        torch.empty(ring_length(group_name), dtype=torch.int64, device="cpu"),
    )


@torch.library.custom_op("interloom::contrastive_backward", mutates_args=())
@outside_autocast
def _contrastive_backward(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor | None,
    labels: torch.Tensor | None,
    row_log_sum: torch.Tensor,
    column_log_sum: torch.Tensor,
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
    block_log_sum, block_weight = column_log_sum, problem.column_weight
    for step in range(ring.world):
        source = (ring.rank - step) % ring.world
        last = step + 1 == ring.world
        travelling = (block_log_sum, block_weight, block, block_labels, label_weight)
        passing = [] if last else [ring.send_on(x, source) for x in _present(*travelling)]
        positives = _positives(ring, source, K, targets, labels, block_labels, label_weight)
        image_part, text_part, scale_part = blocks.block_gradients(
            image, block, scale, row_log_sum, block_log_sum, problem.row_weight, block_weight,
            problem.positive_weight, positives, factor, partial_dtype,
        )  # fmt: skip
        grad_image = image_part if grad_image is None else grad_image.add_(image_part)
        grad_scale = grad_scale + scale_part
        if step == 0:
            own_text = text_part
        else:
            grad_text = text_part if grad_text is None else grad_text.add_(text_part)
            grad_text = ring.send_on(grad_text, source).wait()
        if passing:
            block_log_sum, block_weight = passing[0].wait(), passing[1].wait()
            block, block_labels, label_weight = _received(passing[2:])
    assert grad_image is not None
    grad_text = own_text if grad_text is None else grad_text.add_(own_text)
    assert isinstance(grad_scale, torch.Tensor)
    grad_scale = (ring.sum(grad_scale) * grad).to(scale.dtype)
    return grad_image.to(image.dtype), grad_text.to(text.dtype), grad_scale


@_contrastive_backward.register_fake
def _(grad, image, text, scale, targets, labels, row_log_sum, column_log_sum, sizes, group_name, backend):
    return image.new_empty(image.shape), text.new_empty(text.shape), scale.new_empty(scale.shape)


def _setup_context(ctx, inputs, output) -> None:
    image, text, scale, targets, labels, group_name, backend = inputs
    _, row_log_sum, column_log_sum, sizes = output
    ctx.save_for_backward(image, text, scale, targets, labels, row_log_sum, column_log_sum, sizes)
    ctx.settings = (group_name, backend)
    ctx.mark_non_differentiable(row_log_sum, column_log_sum, sizes)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    grads = _contrastive_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


_contrastive.register_autograd(_autograd_backward, setup_context=_setup_context)
