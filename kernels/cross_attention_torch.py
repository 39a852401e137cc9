"""Gated cross-attention in plain PyTorch for machines without a GPU: visits only the images looked at.

For each image the tokens that see it are gathered (a slice when they are contiguous, so nothing is copied) and
attend to that image's keys alone: with one image a token the work is 1/N of the dense form. A token that sees
several images merges their softmaxes as it goes (online softmax). Arithmetic is float32, or float64 for float64.

Legend: B batch, H heads, T tokens, S = N * image_length keys, D head dim, t the tokens that see one image.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    """Return out [B, H, T, D] and the natural log of each softmax's denominator [B, H, T] (+inf: no image)."""
    batch, heads, tokens, _ = query.shape
    exact = _accumulator(query.dtype)
    one_image = mask.dim() == 2
    out = query.new_zeros(query.shape, dtype=query.dtype if one_image else exact)
    lse = query.new_full((batch, heads, tokens), float("inf") if one_image else float("-inf"), dtype=exact)
    for b, rows, keys in _visits(mask, images, image_length):
        score = torch.bmm(_take(query[b], rows).to(exact), key[b, :, keys].to(exact).mT).mul_(
            scale
        )  # [H, t, L]
        top = score.amax(-1, keepdim=True)
        weight = score.sub_(top).exp_()
        total = weight.sum(-1, keepdim=True)
        part = torch.bmm(weight, value[b, :, keys].to(exact)).div_(total)  # [H, t, D]
        part_lse = (top + total.log()).squeeze(-1)  # [H, t]
        if one_image:
            _put(out[b], rows, part)
            _put(lse[b], rows, part_lse)
        else:
            before = _take(lse[b], rows)
            after = torch.logaddexp(before, part_lse)
            kept = _take(out[b], rows) * (before - after).exp().unsqueeze(-1)
            _put(out[b], rows, kept.addcmul_(part, (part_lse - after).exp().unsqueeze(-1)))
            _put(lse[b], rows, after)
    if not one_image:
        lse = torch.where(lse == float("-inf"), float("inf"), lse)
    return out.to(query.dtype), lse


def backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    images: int,
    image_length: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query [B, H, T, D], key and value [B, H, S, D]."""
    exact = _accumulator(query.dtype)
    one_image = mask.dim() == 2
    d_query = query.new_zeros(query.shape, dtype=query.dtype if one_image else exact)
    d_key, d_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    delta = torch.linalg.vecdot(grad.to(exact), out.to(exact)).unsqueeze(-1)
    lse = lse.unsqueeze(-1)
    for b, rows, keys in _visits(mask, images, image_length):
        q, k, v = _take(query[b], rows).to(exact), key[b, :, keys].to(exact), value[b, :, keys].to(exact)
        g = _take(grad[b], rows).to(exact)
        weight = torch.bmm(q, k.mT).mul_(scale).sub_(_take(lse[b], rows)).exp_()  # [H, t, L]
        d_value[b, :, keys] = torch.bmm(weight.mT, g).to(d_value.dtype)
        d_score = torch.bmm(g, v.mT).sub_(_take(delta[b], rows)).mul_(weight).mul_(scale)
        d_key[b, :, keys] = torch.bmm(d_score.mT, q).to(d_key.dtype)
        part = torch.bmm(d_score, k)
        _put(d_query[b], rows, part if one_image else part.add_(_take(d_query[b], rows)))
    return d_query.to(query.dtype), d_key, d_value


def _visits(
    mask: torch.Tensor, images: int, image_length: int
) -> Iterator[tuple[int, slice | torch.Tensor, slice]]:
    """Yield (batch row, the tokens that see an image, its keys) for every image that is looked at."""
    for b in range(mask.shape[0]):
        for image in range(images):
            rows = tokens_of_image(mask, b, image)
            if len(rows) == 0:
                continue
            first, last = int(rows[0]), int(rows[-1])
            keys = slice(image * image_length, (image + 1) * image_length)
            yield b, slice(first, last + 1) if last - first + 1 == len(rows) else rows, keys


def _take(source: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """source[:, rows]: a view for a slice, else ``index_select``, which is several times faster than indexing."""
    return source[:, rows] if isinstance(rows, slice) else source.index_select(1, rows)


def _put(target: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        target[:, rows] = part
    else:
        target.index_copy_(1, rows, part.to(target.dtype))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
