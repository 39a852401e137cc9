"""Blocks of the contrastive losses in plain PyTorch: similarity tiles that stay in the cache, O(batch) memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# A tile of the similarity in float32 is 1 MB: two of them fit a core's cache beside the features.
_TILE_ROWS, _TILE_COLUMNS = 512, 512
_SMALL = 1e-25  # below this a sum of shifted exponentials may have lost terms to underflow
_SAFE_GAP = 60.0  # exp(60) * exp(-87) is still nothing beside 1 in float32, and exp(60) does not overflow


class Positives(NamedTuple):
    """What a block [M images, N texts] adds to the loss besides the two log-sum-exps: W [M, N], never built.

    ``kind`` is ``"none"``; ``"own"``: W[i, j] = 1 where text j belongs to image i (j // per_image == i);
    ``"labels"``: W[i, j] = label_weight[j] * #{k: row_labels[i, k] == column_labels[j]}; ``"targets"``: W = targets.
    """

    kind: str
    per_image: int = 1
    row_labels: torch.Tensor | None = None  # [M, K] int64
    column_labels: torch.Tensor | None = None  # [N] int64
    label_weight: torch.Tensor | None = None  # [N] float
    targets: torch.Tensor | None = None  # [M, N] float


def _tiles(M: int, N: int) -> Iterator[tuple[slice, slice]]:
    for row in range(0, M, _TILE_ROWS):
        for column in range(0, N, _TILE_COLUMNS):
            yield slice(row, min(row + _TILE_ROWS, M)), slice(column, min(column + _TILE_COLUMNS, N))


def _weight_tile(
    positives: Positives, rows: slice, columns: slice, dtype: torch.dtype
) -> torch.Tensor | None:
    """The tile of W for labels and targets, or None."""
    if positives.kind == "targets":
        assert positives.targets is not None
        return positives.targets[rows, columns].to(dtype)
    if positives.kind == "labels":
        row_labels, column_labels, weight = positives[2:5]
        assert row_labels is not None
        assert column_labels is not None
        assert weight is not None
        same = (row_labels[rows, :, None] == column_labels[columns]).sum(dim=1)  # [m, n]
        return same.to(dtype).mul_(weight[columns].to(dtype))
    return None


def block_log_sum_exps(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, positives: Positives
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp of every row [M] and column [N] of S = scale * image text^T, and sum(W * S), in float64.

    In float32 a log-sum-exp of 100 would be off by 4e-6, and with it every weight that backward makes from it.

    One exponential per element serves both directions: exp(S - max of the tile), unless a row or a column of the
    tile lies so far below that it would underflow; then each direction takes its own maximum.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    image, text, scale = image.to(dtype), text.to(dtype), scale.to(dtype)
    M, N = image.shape[0], text.shape[0]
    row_log_sum = image.new_full((M,), -torch.inf, dtype=torch.float64)
    column_log_sum = image.new_full((N,), -torch.inf, dtype=torch.float64)
    positive_sum = torch.zeros((), dtype=torch.float64, device=image.device)
    shared = image.device.type == "cpu"  # elsewhere the question would stall the device
    for rows, columns in _tiles(M, N):
        tile = (image[rows] * scale) @ text[columns].T
        weight = _weight_tile(positives, rows, columns, dtype)
        if weight is not None:
            positive_sum = positive_sum + (weight * tile).sum(dtype=torch.float64)
        elif positives.kind == "own":
            # Of the very entries that the log-sum-exps hold: their rounding cancels where the loss is small.
            positive_sum = positive_sum + tile[_own_entries(positives, rows, columns, image.device)].sum(
                dtype=torch.float64
            )
        row_part = column_part = None
        if shared:
            top = tile.max()
            exponential = torch.exp(tile - top)
            row_part, column_part = exponential.sum(dim=1), exponential.sum(dim=0)
            if min(float(row_part.min()), float(column_part.min())) > _SMALL:
                row_part, column_part = row_part.double().log_() + top, column_part.double().log_() + top
            else:
                row_part = column_part = None
        if row_part is None or column_part is None:
            row_part, column_part = tile.double().logsumexp(dim=1), tile.double().logsumexp(dim=0)
        row_log_sum[rows] = torch.logaddexp(row_log_sum[rows], row_part)
        column_log_sum[columns] = torch.logaddexp(column_log_sum[columns], column_part)
    return row_log_sum, column_log_sum, positive_sum


def _own_entries(
    positives: Positives, rows: slice, columns: slice, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column inside the tile of every text of the tile whose own image is in the tile too."""
    K = positives.per_image
    first = max(rows.start * K, columns.start)
    own = torch.arange(first, max(first, min(rows.stop * K, columns.stop)), device=device)
    return own // K - rows.start, own - columns.start


def block_gradients(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    row_log_sum: torch.Tensor,
    column_log_sum: torch.Tensor,
    row_weight: torch.Tensor,
    column_weight: torch.Tensor,
    positive_weight: float,
    positives: Positives,
    factor: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of image [M, D] and text [N, D] times ``factor``, and of scale without it.

    Both gradients of a tile come from one g = row_weight exp(S - row_log_sum) + column_weight exp(S - column_log_sum)
    - positive_weight W: scale * g text and scale * g^T image. The scale's is sum(g * image text^T), which is the image
    gradient dotted with the image. ``row_log_sum`` [M] and ``column_log_sum`` [N] are log-sum-exps in float64.
    """
    dtype = torch.promote_types(image.dtype, torch.float32)
    image, text, scale = image.to(dtype), text.to(dtype), scale.to(dtype)
    grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
    sums = torch.empty(0, dtype=dtype, device=image.device)
    for rows, columns in _tiles(image.shape[0], text.shape[0]):
        tile = (image[rows] * scale) @ text[columns].T
        row, column = row_log_sum[rows], column_log_sum[columns]
        # min of the log-sum-exps bounds how far the shared shift may stand above any of them
        top = tile.max()
        if image.device.type == "cpu" and float(top - torch.minimum(row.min(), column.min())) < _SAFE_GAP:
            row_factor = row_weight[rows] * torch.exp(top - row).to(dtype)
            column_factor = column_weight[columns] * torch.exp(top - column).to(dtype)
            sums = torch.add(row_factor[:, None], column_factor, out=sums.resize_(tile.shape))
            weight = tile.sub_(top).exp_().mul_(sums)
        else:
            weight = torch.exp((tile - row[:, None]).to(dtype)).mul_(row_weight[rows, None])
            weight += torch.exp((tile - column).to(dtype)).mul_(column_weight[columns])
        _subtract_positives(weight, positives, positive_weight, rows, columns)
        grad_image[rows].addmm_(weight, text[columns])
        grad_text[columns].addmm_(weight.T, image[rows])
    grad_scale = torch.zeros((), dtype=torch.float64, device=image.device)
    for row in range(0, image.shape[0], 4096):
        part = torch.einsum("md,md->m", grad_image[row : row + 4096], image[row : row + 4096])
        grad_scale = grad_scale + part.sum(dtype=torch.float64)
    factor = factor.to(dtype) * scale
    return (
        grad_image.mul_(factor).to(out_dtype),
        grad_text.mul_(factor).to(out_dtype),
        grad_scale.to(dtype),
    )


def _subtract_positives(
    weight: torch.Tensor, positives: Positives, positive_weight: float, rows: slice, columns: slice
) -> None:
    if positives.kind == "own":
        weight[_own_entries(positives, rows, columns, weight.device)] -= positive_weight
        return
    target = _weight_tile(positives, rows, columns, weight.dtype)
    if target is not None:
        weight.sub_(target, alpha=positive_weight)
