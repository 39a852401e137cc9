"""Gated cross-attention in plain PyTorch for machines without a GPU: visits only the images looked at.

With one image a token, the tokens of each image are gathered (a slice, hence no copy, if they stand together) and
attend to that image's keys alone: 1/N of the dense work. A token that sees several images gathers
one image at a time and merges their softmaxes as it goes (online softmax). Arithmetic is float32, or float64 for
float64.

Legend: B batch, H heads, T tokens, L ``image_length``, S = N * L keys, D head dim, t the tokens that see an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from .image_lists import tokens_of_image


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    images: int,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out [B, H, T, D] and, if tokens see several images, their log-sum-exp [B, H, T] (+inf: no image)."""
    exact = _accumulator(query.dtype)
    out = query.new_zeros(query.shape)
    log_sum_exp = query.new_zeros(query.shape[:3], dtype=exact)
    for b in range(len(mask)):
        inputs = (query[b], key[b].to(exact), value[b].to(exact))
        if mask.dim() == 2:
            _forward_one(out[b], *inputs, mask[b], images, image_length, scale)
        else:
            out[b], log_sum_exp[b] = _forward_several(*inputs, mask[b], images, image_length, scale)
    return out, log_sum_exp


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    mask: torch.Tensor,
    images: int,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query [B, H, T, D], key and value [B, H, S, D]."""
    exact = _accumulator(query.dtype)
    d_query = query.new_zeros(query.shape)
    d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    for b in range(len(mask)):
        inputs = (grad[b], query[b], key[b].to(exact), value[b].to(exact))
        visits = (d_key[b], d_value[b], mask[b], images, image_length, scale)
        if mask.dim() == 2:
            _backward_one(d_query[b], *inputs, *visits)
        else:
            d_query[b] = _backward_several(*inputs, out[b], log_sum_exp[b], *visits)
    return d_query, d_key, d_value


def _forward_one(out, query, key, value, index, images, image_length, scale) -> None:
    for rows, keys in _groups(index, images, image_length):
        weight = _scores(_take(query, rows).to(key.dtype), key[:, keys], scale).softmax(-1)  # [H, t, L]
        _put(out, rows, torch.bmm(weight, value[:, keys]))


def _backward_one(
    d_query, grad, query, key, value, d_key, d_value, index, images, image_length, scale
) -> None:
    for rows, keys in _groups(index, images, image_length):
        q, g = _take(query, rows).to(key.dtype), _take(grad, rows).to(key.dtype)
        weight = _scores(q, key[:, keys], scale).softmax(-1)  # [H, t, L]
        d_value[:, keys] = torch.bmm(weight.mT, g)
        d_weight = torch.bmm(g, value[:, keys].mT)
        delta = torch.linalg.vecdot(weight, d_weight).unsqueeze(-1)  # the keys of one image are the whole row
        d_score = d_weight.sub_(delta).mul_(weight).mul_(scale)
        d_key[:, keys] = torch.bmm(d_score.mT, q)
        _put(d_query, rows, torch.bmm(d_score, key[:, keys]))


def _forward_several(
    query, key, value, words, images, image_length, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_zeros(query.shape, dtype=key.dtype)
    log_sum_exp = query.new_full(query.shape[:2], float("-inf"), dtype=key.dtype)
    for rows, keys in _visits(words, images, image_length):
        score = _scores(query.index_select(1, rows).to(key.dtype), key[:, keys], scale)  # [H, t, L]
        top = score.amax(-1, keepdim=True)
        weight = score.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True)
        part = torch.bmm(weight, value[:, keys]).div_(total)  # [H, t, D]
        part_log_sum_exp = (top + total.log()).squeeze(-1)  # [H, t]
        before = log_sum_exp.index_select(1, rows)
        after = torch.logaddexp(before, part_log_sum_exp)
        kept = out.index_select(1, rows) * (before - after).exp().unsqueeze(-1)
        out.index_copy_(1, rows, kept.addcmul_(part, (part_log_sum_exp - after).exp().unsqueeze(-1)))
        log_sum_exp.index_copy_(1, rows, after)
    return out, torch.where(log_sum_exp == float("-inf"), float("inf"), log_sum_exp)


def _backward_several(
    grad, query, key, value, out, log_sum_exp, d_key, d_value, words, images, image_length, scale
) -> torch.Tensor:
    d_query = query.new_zeros(query.shape, dtype=key.dtype)
    delta = torch.linalg.vecdot(grad.to(key.dtype), out.to(key.dtype)).unsqueeze(-1)
    log_sum_exp = log_sum_exp.unsqueeze(-1)
    for rows, keys in _visits(words, images, image_length):
        q, g = (tensor.index_select(1, rows).to(key.dtype) for tensor in (query, grad))
        weight = _scores(q, key[:, keys], scale).sub_(log_sum_exp.index_select(1, rows)).exp_()  # [H, t, L]
        d_value[:, keys] = torch.bmm(weight.mT, g)
        d_weight = torch.bmm(g, value[:, keys].mT)
        d_score = d_weight.sub_(delta.index_select(1, rows)).mul_(weight).mul_(scale)
        d_key[:, keys] = torch.bmm(d_score.mT, q)
        d_query.index_add_(1, rows, torch.bmm(d_score, key[:, keys]))
    return d_query


def _groups(
    index: torch.Tensor, images: int, image_length: int
) -> Iterator[tuple[slice | torch.Tensor, slice]]:
    """Yield (the tokens that see it, its keys) for every image that is looked at; a slice if it can be one."""
    in_order, order = index.sort(stable=True)
    bounds = torch.arange(images + 1, dtype=index.dtype, device=index.device)
    edges = torch.searchsorted(in_order, bounds).tolist()
    for image, (first, last) in enumerate(pairwise(edges)):
        if first == last:
            continue
        rows = order[first:last]
        start, stop = int(rows[0]), int(rows[-1]) + 1
        keys = slice(image * image_length, (image + 1) * image_length)
        yield slice(start, stop) if stop - start == last - first else rows, keys


def _visits(words: torch.Tensor, images: int, image_length: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Yield (the tokens that see it, its keys) for every image that is looked at."""
    for image in range(images):
        rows = tokens_of_image(words, image)
        if len(rows):
            yield rows, slice(image * image_length, (image + 1) * image_length)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * query @ key.mT; the scale costs nothing here."""
    score = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
    return torch.baddbmm(score, query, key.mT, beta=0, alpha=scale, out=score)


def _take(source: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    return source[:, rows] if isinstance(rows, slice) else source.index_select(1, rows)


def _put(target: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        target[:, rows] = part
    else:
        target.index_copy_(1, rows, part.to(target.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
