"""Scores: pixel counts and intersection over union, accuracy among the k best, recall of retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = 255


def confusion(predicted: Tensor, truth: Tensor, num_classes: int, ignored: int = IGNORED) -> Tensor:
    """Pixel counts [num_classes, num_classes], truth down and prediction across; ``ignored`` truth left out.

    Raises:
        ValueError: the two differ in shape, or truth holds an id that is no class.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"the prediction is {list(predicted.shape)} but the truth {list(truth.shape)}; they must agree."
        )
    keep = truth != ignored
    truth, predicted = truth[keep].long(), predicted[keep].long()
    if truth.numel() and int(truth.max()) >= num_classes:
        raise ValueError(
            f"the truth holds class {int(truth.max())}, but there are {num_classes} classes with the "
            "background; check which class list goes with these masks."
        )
    pairs = truth * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """IoU of each class [C] from pixel counts [C, C]; NaN of a class that is neither there nor predicted."""
    shared = counts.diagonal().double()
    return shared / (counts.sum(0) + counts.sum(1) - counts.diagonal())


def segmentation_scores(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """``segmentation/miou`` (mean over classes), ``segmentation/pixel_accuracy``, ``segmentation/iou/<class>``."""
    iou = intersection_over_union(counts)
    scores = {
        "segmentation/miou": float(iou.nanmean()),
        "segmentation/pixel_accuracy": float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
    }
    for name, value in zip(names, iou.tolist(), strict=True):
        if value == value:
            scores[f"segmentation/iou/{name}"] = value
    return scores


def accuracy(scores: Tensor, truth: Tensor, best: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Share of rows of ``scores`` [N, C] whose class in ``truth`` [N] is among the k best, for each k."""
    order = scores.topk(min(max(best), scores.shape[1]), dim=1).indices
    hits = order == truth[:, None]
    return {k: float(hits[:, :k].any(1).double().mean()) for k in best}


def recall(
    similarity: Tensor, matches: Sequence[set[int]], best: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of queries (rows of [N, M]) that find one of their ``matches`` (columns) among the k best."""
    order = similarity.topk(min(max(best), similarity.shape[1]), dim=1).indices.tolist()
    found = [
        next((rank for rank, column in enumerate(row) if column in match), len(row) + max(best))
        for row, match in zip(order, matches, strict=True)
    ]
    return {k: sum(rank < k for rank in found) / max(len(found), 1) for k in best}
