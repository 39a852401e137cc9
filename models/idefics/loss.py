"""The language-model loss without a matrix of logits.

For M rows with hidden state h and label y:

    nll = logsumexp(W h) - W[y] . h          z = logsumexp(W h)^2

The z-loss (Chowdhery et al. 2022, section 5) keeps the softmax denominator near one; its log-sum-exp is the
loss plus the label's logit, which costs one row product instead of a second pass. Sums are float32.

Legend: M rows, C hidden size, V tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

try:  # from torch 2.13 on
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
except ImportError:
    LinearCrossEntropyOptions = None

IGNORED = -100  # label of a row that is not predicted; only where a graph of fixed shapes is traced
_CHUNK_ELEMENTS = 1 << 25  # logits in memory at a time, in this module's own chunks: 128 MiB of float32


class LossSums(NamedTuple):
    """Float32 scalars: negative log-likelihoods and squared log-sum-exps, summed, and the rows in each
    sum. ``groups`` [2, G], where groups were given: negative log-likelihood and rows of each, detached.
    """

    nll: Tensor
    z: Tensor
    rows: Tensor
    z_rows: Tensor
    groups: Tensor | None = None


def language_model_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss_exclude: Tensor | None = None,
    groups: Tensor | None = None,
    want_z: bool = True,
) -> LossSums:
    """Sum the losses of ``hidden`` [M, C] under ``weight`` [V, C] and ``labels`` int64 [M].

    Args:
        z_loss_exclude: int64 ids; rows with such a label take no part in the z sum (IDEFICS left ``<image>``
            out).
        groups: int64 [M], group of each row from 0, to sum the losses of each group as well.
        want_z: Leave the z sum at zero if false: a sum alone needs one pass over the vocabulary, not two.
    """
    tracing = torch.compiler.is_compiling()
    counted = (labels != IGNORED).float()
    rows_in_all = counted.sum() if tracing else torch.tensor(float(len(labels)), device=labels.device)
    if z_loss_exclude is not None:
        counted = counted * (~torch.isin(labels, z_loss_exclude)).float()
    if not tracing and len(labels) == 0:
        zero = hidden.float().sum() + 0.0 * weight[:1].float().sum()  # keeps the graph: gradients are zeros
        return LossSums(zero, zero, rows_in_all, counted.sum(), _by_group(hidden[:, 0], groups))
    autocast = torch.is_autocast_enabled(hidden.device.type)
    # While a graph is traced the chunks below are read: F.linear_cross_entropy warns, which cannot be traced.
    fused = hidden.dtype == weight.dtype == torch.float32 and not autocast and not tracing
    if LinearCrossEntropyOptions is not None and fused and not want_z and groups is None:
        # A sum's gradients are made in the forward pass already; row by row they would be made again in
        # backward.
        nll = F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum", options=LinearCrossEntropyOptions()
        )
        return LossSums(nll, torch.zeros_like(rows_in_all), rows_in_all, counted.sum())
    if LinearCrossEntropyOptions is not None and fused:
        nll = F.linear_cross_entropy(
            hidden, weight, labels, reduction="none", options=LinearCrossEntropyOptions()
        )
        lse = nll + (hidden * weight[labels.clamp(min=0)]).sum(-1)
        z = (lse.square() * counted).sum()
        return LossSums(nll.sum(), z, rows_in_all, counted.sum(), _by_group(nll, groups))
    rows = max(64, _CHUNK_ELEMENTS // weight.shape[0])
    nlls, z_sums = [], []
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        nll, z = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
            _chunk, hidden[part], weight, labels[part], counted[part], use_reentrant=False
        )
        nlls.append(nll)
        z_sums.append(z)
    nll = torch.cat(nlls)
    return LossSums(nll.sum(), torch.stack(z_sums).sum(), rows_in_all, counted.sum(), _by_group(nll, groups))


def _by_group(nll: Tensor, groups: Tensor | None) -> Tensor | None:
    if groups is None:
        return None
    count = int(groups.max()) + 1 if len(groups) else 0
    sums = torch.zeros(2, count, device=nll.device)
    sums[0].index_add_(0, groups, nll.detach().float())
    sums[1].index_add_(0, groups, torch.ones_like(nll, dtype=torch.float32))
    return sums


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    logits = F.linear(hidden, weight).float()
    lse = logits.logsumexp(-1)
    nll = (lse - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]).masked_fill(labels == IGNORED, 0.0)
    return nll, (lse.square() * counted).sum()
