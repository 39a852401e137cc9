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

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..common.backend import refuse_forward_mode, resolve_backend
from .operator import contrastive_op

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
    image, text = _autocast(image, text)
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
    image, text = _autocast(image, text)
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
    if image.dtype == torch.float64 and backend == "auto":
        resolved = "torch"  # float64 is for checking; tensor cores have no use here
    else:
        resolved = resolve_backend(backend, image)
    if resolved == "triton" and image.dtype == torch.float64:
        raise ValueError(
            "image is float64, which the Triton kernels do not take; use float32 or backend='torch'."
        )
    refuse_forward_mode(name, image, text, logit_scale)
    scale = logit_scale.reshape(()).to(torch.promote_types(image.dtype, torch.float32))
    group_name = group.group_name if group is not None else ""
    return contrastive_op(image, text, scale, targets, labels, group_name, resolved)[0]


def _autocast(image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    device_type = image.device.type
    if torch.is_autocast_enabled(device_type) and image.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return image.to(dtype), text.to(dtype)
    return image, text


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
