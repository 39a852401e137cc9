"""Blocks of the contrastive losses by the Triton kernels: tile sizes, partial results, launches.

Forward, one launch takes a band of row blocks; a program holds BLOCK_M images and walks over a span of texts. With
m = ceil(M / BLOCK_M) row blocks, s spans and e bytes an element it moves

    (s M + m N) D e               features: images once a span, texts once a row block
    16 s M + 16 m N + 8 (M + N)   partial peaks and sums written and read, results written
    4 s M + 16 N (bands - 1)      positive logits (8 s M for several in float32); running results merged with every
                                  further band

Backward, for each side with R rows, C columns, r = ceil(R / BLOCK_R) row blocks and s spans

    (s R + r C) D e + 8 s R + 8 r C    features and statistics
    R D e, or R D e + 8 s R D          the gradient; with s > 1 through partial sums in float32
    4 s R                              for images, the gradient of the scale

and 4 bytes a program for each scalar, 8 for each label compared, the targets' own size. Everything is reduced in a
fixed order, without atomics.
"""

# Triton's launch syntax takes constants and options that the signatures do not show.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import math

import torch
import triton

from ..common.arch import multiprocessors
from ..common.launch import dot_precision, launch_column, on_its_device
from ..common.partials import sum_partials
from .kernels import (
    contrastive_backward_gradient_kernel,
    contrastive_forward_kernel,
    contrastive_merge_forward_kernel,
)
from .torch_path import Positives

_KINDS = {"none": 0, "own": 1, "labels": 2, "targets": 3}
_BAND = 128  # row blocks a launch: bounds the partial log-sum-exps to 512 bytes a text
_MERGE_BLOCK = 1024
_FORWARD_SPANS = 16
_BACKWARD_SPANS = 2  # each more writes and reads a float32 gradient

# (rows, columns, warps, stages) for two-byte elements and up to 256 channels, per pass.
# ``launch_column`` says which cards share the row of sm_86.
FORWARD = {
    "sm_80": (128, 128, 8, 2),
    "sm_86": (128, 64, 8, 2),
    "sm_90": (128, 128, 8, 2),
    "sm_100": (128, 64, 8, 2),
    "gfx942": (128, 64, 8, 1),
    "interpret": (32, 32, 4, 1),
}
BACKWARD = {
    "sm_80": (64, 64, 8, 2),
    "sm_86": (64, 64, 8, 2),
    "sm_90": (128, 32, 8, 3),
    "sm_100": (128, 64, 8, 2),
    "gfx942": (64, 32, 8, 1),
    "interpret": (32, 32, 4, 1),
}
# The same and the channels for float32 on a GPU; products over more channels are made again for each block of them.
FLOAT32 = (32, 32, 64, 8, 1)


def launch_options(table: dict[str, tuple[int, int, int, int]], image: torch.Tensor) -> dict[str, int]:
    """Tile rows and columns, channels a block, warps and stages for features like ``image`` [M, D]."""
    rows, columns, warps, stages = launch_column(table, image)
    D = image.shape[1]
    most_channels = 256
    if (
        image.element_size() == 4 and rows > 32
    ):  # three products of tf32 each, whose operands fill the registers
        rows, columns, most_channels, warps, stages = FLOAT32
    block_d = min(triton.next_power_of_2(max(D, 16)), most_channels)
    return {
        "rows": rows,
        "columns": columns,
        "BLOCK_D": block_d,
        "D_BLOCKS": triton.cdiv(D, block_d),
        "num_warps": warps,
        "num_stages": stages,
    }


def _spans(blocks: int, columns: int, block: int, most: int, image: torch.Tensor) -> tuple[int, int]:
    """(spans, columns a span): programs for every multiprocessor even when there are few row blocks."""
    tiles = triton.cdiv(columns, block)
    wanted = min(tiles, most, max(1, multiprocessors(image) // blocks))
    per_span = triton.cdiv(tiles, wanted) * block
    return triton.cdiv(columns, per_span), per_span


def _rowwise(features: torch.Tensor) -> torch.Tensor:
    return features if features.stride(1) == 1 else features.contiguous()


def _positive_arguments(positives: Positives, dummy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(labels of images, of texts, weights of the texts' labels, targets), with a stand-in for what is not there."""
    return tuple(x if x is not None else dummy for x in positives[2:])


@on_its_device
def block_lse(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, positives: Positives
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``contrastive_torch.block_lse``.

    The kernels keep a largest logit and a sum of exponentials apart, each exact to float32; their log-sum-exp in one
    float32 would be off by 4e-6 at 100, and with it every weight of the backward pass.
    """
    image, text = _rowwise(image), _rowwise(text)
    (M, D), N = image.shape, text.shape[0]
    options = launch_options(FORWARD, image)
    block_m, block_n = options.pop("rows"), options.pop("columns")
    kind = _KINDS[positives.kind]
    blocks = triton.cdiv(M, block_m)
    spans, per_span = _spans(min(blocks, _BAND), N, block_n, _FORWARD_SPANS, image)
    row_part = image.new_empty((2, spans, M), dtype=torch.float32)
    sums = 2 if positives.per_image > 1 and image.dtype == torch.float32 else 1
    positive_part = image.new_empty((sums, spans, M) if kind else (0,), dtype=torch.float32)
    column_part = image.new_empty(2 * min(blocks, _BAND) * N, dtype=torch.float32)
    row_whole = image.new_empty((2, M), dtype=torch.float32)
    column_whole = image.new_empty((2, N), dtype=torch.float32)
    row_labels, column_labels, label_weight, targets = _positive_arguments(positives, image)
    for first in range(0, blocks, _BAND):
        band = min(_BAND, blocks - first)
        contrastive_forward_kernel[(band, spans)](
            image,
            text,
            scale,
            row_labels,
            column_labels,
            label_weight,
            targets,
            row_part,
            column_part,
            positive_part,
            M,
            N,
            D,
            first * block_m,
            per_span,
            image.stride(0),
            text.stride(0),
            *(targets.stride() if kind == 3 else (0, 0)),
            KIND=kind,
            KEYS=positives.per_image,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            EVEN_M=M % block_m == 0,
            EVEN_N=N % block_n == 0,
            EVEN_D=D % options["BLOCK_D"] == 0,
            PRECISION=dot_precision(image),
            **options,
        )
        _merge(column_part, band, column_whole, first > 0)
    _merge(row_part, spans, row_whole, False)
    positive_sum = positive_part.sum(dtype=torch.float64) * math.log(2)
    return _log_sum_exp(row_whole), _log_sum_exp(column_whole), positive_sum


def _merge(parts: torch.Tensor, count: int, whole: torch.Tensor, has_whole: bool) -> None:
    length = whole.shape[1]
    contrastive_merge_forward_kernel[(triton.cdiv(length, _MERGE_BLOCK),)](
        parts, whole, count, length, count * length, HAS_WHOLE=has_whole, BLOCK=_MERGE_BLOCK, num_warps=4
    )


def _log_sum_exp(whole: torch.Tensor) -> torch.Tensor:
    """Float64 [L] from largest logits in base 2 and sums [2, L]."""
    top, total = whole.double()
    return torch.add(total.log_(), top, alpha=math.log(2))


def _peak_and_weight(lse: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (peak, factor) [L] with exp2(x - peak) * factor = exp(x ln 2 - lse) * weight.

    The peak is the log-sum-exp in base 2, rounded; the factor takes up what the rounding left.
    """
    exact = lse * math.log2(math.e)
    peak = exact.float()
    return peak, (torch.exp2(peak - exact) * weight).float()


@on_its_device
def block_gradients(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    row_lse: torch.Tensor,
    column_lse: torch.Tensor,
    row_weight: torch.Tensor,
    column_weight: torch.Tensor,
    positive_weight: float,
    positives: Positives,
    factor: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``contrastive_torch.block_gradients``."""
    image, text = _rowwise(image), _rowwise(text)
    # The tile of weights enters a tensor core in the features' dtype: bring its largest to 128, well inside
    # float16, whose smallest number then stands for 5e-10 of it.
    largest = torch.maximum(row_weight.max(), column_weight.max()).clamp(min=positive_weight)
    unit = 128.0 / largest
    scalars = torch.stack([scale, positive_weight * unit, factor * scale / unit])
    row_peak, row_weight = _peak_and_weight(row_lse, row_weight * unit)
    column_peak, column_weight = _peak_and_weight(column_lse, column_weight * unit)
    image_labels, text_labels, label_weight, targets = _positive_arguments(positives, image)
    strides = targets.stride() if positives.kind == "targets" else (0, 0)
    shared = (_KINDS[positives.kind], positives, label_weight, targets, scalars, out_dtype)
    grad_image, scale_part = _side(
        image,
        text,
        row_peak,
        column_peak,
        row_weight,
        column_weight,
        image_labels,
        text_labels,
        strides,
        False,
        *shared,
    )
    grad_text, _ = _side(
        text,
        image,
        column_peak,
        row_peak,
        column_weight,
        row_weight,
        text_labels,
        image_labels,
        strides[::-1],
        True,
        *shared,
    )
    return grad_image, grad_text, scale_part.sum(dtype=torch.float64).float() / unit


def _side(
    side: torch.Tensor,
    other: torch.Tensor,
    side_peak: torch.Tensor,
    other_peak: torch.Tensor,
    side_weight: torch.Tensor,
    other_weight: torch.Tensor,
    side_labels: torch.Tensor,
    other_labels: torch.Tensor,
    target_strides: tuple[int, ...],
    is_text: bool,
    kind: int,
    positives: Positives,
    label_weight: torch.Tensor,
    targets: torch.Tensor,
    scalars: torch.Tensor,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of one side [R, D] and, for images, the sums of its weights times cosines [spans, R]."""
    (R, D), C = side.shape, other.shape[0]
    options = launch_options(BACKWARD, side)
    block_r, block_c = options.pop("rows"), options.pop("columns")
    blocks = triton.cdiv(R, block_r)
    spans, per_span = _spans(blocks, C, block_c, _BACKWARD_SPANS, side)
    gradient = side.new_empty((R, D), dtype=out_dtype)
    parts = gradient if spans == 1 else side.new_empty((spans, R, D), dtype=torch.float32)
    scale_part = side.new_empty((spans, R) if not is_text else (0,), dtype=torch.float32)
    # Own texts: K stand for an image. Labels: K belong to an image, one to a text.
    side_keys, other_keys = (positives.per_image, 1) if is_text == (kind == 1) else (1, positives.per_image)
    contrastive_backward_gradient_kernel[(blocks, spans, options["D_BLOCKS"])](
        side,
        other,
        scalars,
        side_peak,
        other_peak,
        side_weight,
        other_weight,
        side_labels,
        other_labels,
        label_weight,
        targets,
        parts,
        scale_part,
        R,
        C,
        D,
        per_span,
        side.stride(0),
        other.stride(0),
        *target_strides,
        KIND=kind,
        ROW_KEYS=side_keys,
        COLUMN_KEYS=other_keys,
        TEXT_ROWS=is_text,
        WITH_SCALE=not is_text,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        EVEN_R=R % block_r == 0,
        EVEN_C=C % block_c == 0,
        EVEN_D=D % options["BLOCK_D"] == 0,
        PRECISION=dot_precision(side),
        **options,
    )
    if spans > 1:
        sum_partials(parts, gradient)
    return gradient, scale_part
