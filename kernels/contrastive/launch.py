"""Blocks of the contrastive losses by the Triton kernels: tile sizes, partial results, launches.

Forward, one launch takes a band of row blocks; a program holds a block of images and walks over a span of texts.
Backward, a program holds a block of one side and walks over a span of the other, once for each side. Everything is
reduced in a fixed order, without atomics; ``bytes_moved`` says what that costs.
"""

# Triton's launch syntax takes constants and options that the signatures do not show.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import math
from collections import Counter

import torch
import triton

from ..common.arch import multiprocessors
from ..common.launch import dot_precision, launch_column, on_its_device
from ..common.partials import sum_partials
from ..common.traffic import Floor, Traffic, float32_sum_bytes
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
    # Three products of tf32 each, whose operands fill the registers.
    if image.element_size() == 4 and rows > 32:
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
def block_log_sum_exps(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, positives: Positives
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``torch_path.block_log_sum_exps``.

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
    sums = _positive_sums(image, positives)
    positive_part = image.new_empty((sums, spans, M) if kind else (0,), dtype=torch.float32)
    column_part = image.new_empty(2 * min(blocks, _BAND) * N, dtype=torch.float32)
    row_whole = image.new_empty((2, M), dtype=torch.float32)
    column_whole = image.new_empty((2, N), dtype=torch.float32)
    row_labels, column_labels, label_weight, targets = _positive_arguments(positives, image)
    for first in range(0, blocks, _BAND):
        band = min(_BAND, blocks - first)
        contrastive_forward_kernel[(band, spans)](
            image, text, scale, row_labels, column_labels, label_weight, targets, row_part, column_part, positive_part,
            M, N, D, first * block_m, per_span, image.stride(0), text.stride(0),
            *(targets.stride() if kind == 3 else (0, 0)), KIND=kind, KEYS=positives.per_image,
            BLOCK_M=block_m, BLOCK_N=block_n, EVEN_M=M % block_m == 0, EVEN_N=N % block_n == 0,
            EVEN_D=D % options["BLOCK_D"] == 0, PRECISION=dot_precision(image), **options,
        )  # fmt: skip
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


def _peak_and_weight(log_sum_exp: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 (peak, factor) [L] with exp2(x - peak) * factor = exp(x ln 2 - log_sum_exp) * weight.

    The peak is the log-sum-exp in base 2, rounded; the factor takes up what the rounding left.
    """
    exact = log_sum_exp * math.log2(math.e)
    peak = exact.float()
    return peak, (torch.exp2(peak - exact) * weight).float()


@on_its_device
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
    """As ``torch_path.block_gradients``."""
    image, text = _rowwise(image), _rowwise(text)
    # The tile of weights enters a tensor core in the features' dtype: bring its largest to 128, well inside
    # float16, whose smallest number then stands for 5e-10 of it.
    largest = torch.maximum(row_weight.max(), column_weight.max()).clamp(min=positive_weight)
    unit = 128.0 / largest
    scalars = torch.stack([scale, positive_weight * unit, factor * scale / unit])
    row_peak, row_weight = _peak_and_weight(row_log_sum, row_weight * unit)
    column_peak, column_weight = _peak_and_weight(column_log_sum, column_weight * unit)
    image_labels, text_labels, label_weight, targets = _positive_arguments(positives, image)
    strides = targets.stride() if positives.kind == "targets" else (0, 0)
    shared = (_KINDS[positives.kind], positives, label_weight, targets, scalars, out_dtype)
    grad_image, scale_part = _side(
        image, text, row_peak, column_peak, row_weight, column_weight, image_labels, text_labels, strides, False,
        *shared,
    )  # fmt: skip
    grad_text, _ = _side(
        text, image, column_peak, row_peak, column_weight, row_weight, text_labels, image_labels, strides[::-1], True,
        *shared,
    )  # fmt: skip
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
    side_keys, other_keys = _keys(kind, positives.per_image, is_text)
    contrastive_backward_gradient_kernel[(blocks, spans, options["D_BLOCKS"])](
        side, other, scalars, side_peak, other_peak, side_weight, other_weight, side_labels, other_labels,
        label_weight, targets, parts, scale_part, R, C, D, per_span, side.stride(0), other.stride(0), *target_strides,
        KIND=kind, ROW_KEYS=side_keys, COLUMN_KEYS=other_keys, TEXT_ROWS=is_text, WITH_SCALE=not is_text,
        BLOCK_R=block_r, BLOCK_C=block_c, EVEN_R=R % block_r == 0, EVEN_C=C % block_c == 0,
        EVEN_D=D % options["BLOCK_D"] == 0, PRECISION=dot_precision(side), **options,
    )  # fmt: skip
    if spans > 1:
        sum_partials(parts, gradient)
    return gradient, scale_part


def _keys(kind: int, per_image: int, is_text: bool) -> tuple[int, int]:
    """How many rows of one side stand for one of the other ("own"), or labels belong to one ("labels")."""
    return (per_image, 1) if is_text == (kind == 1) else (1, per_image)


def _positive_sums(image: torch.Tensor, positives: Positives) -> int:
    """Float32 sums of positive logits: with several, float32 features keep what rounding left apart."""
    return 2 if positives.per_image > 1 and image.dtype == torch.float32 else 1


def bytes_moved(
    image: torch.Tensor, text: torch.Tensor, positives: Positives, *, out_dtype: torch.dtype | None = None
) -> Traffic:
    """Bytes of :func:`block_log_sum_exps` and :func:`block_gradients` for features like these, exactly.

    The floor keeps the tiling: forward the images are read once, the texts once a block of images, and a log-sum-exp
    of each written; backward, for both sides, one side and its gradient pass once, the other side with a log-sum-exp
    and a weight a row once a block of it.

    Args:
        image, text: [M, D] and [N, D]; of them only shape, dtype and device count, so ``meta`` will do.
        positives: their kind, texts an image and, if soft, the targets' dtype.
        out_dtype: that of the gradients, by default the features'.
    """
    (images, channels), texts, element = image.shape, text.shape[0], image.element_size()
    row_bytes = channels * element
    options = launch_options(FORWARD, image)
    rows = options["rows"]
    blocks = triton.cdiv(images, rows)
    forward = _forward_bytes(image, texts, positives, options)
    floor_forward = row_bytes * (images + blocks * texts) + 4 * (images + texts)

    backward, floor_backward = Counter(), 0
    gradient_bytes = (out_dtype or image.dtype).itemsize
    options = launch_options(BACKWARD, image)
    for side, other, is_text in ((images, texts, False), (texts, images, True)):
        blocks = triton.cdiv(side, options["rows"])
        spans, _ = _spans(blocks, other, options["columns"], _BACKWARD_SPANS, image)
        moved = _side_bytes(side, other, spans, positives, is_text, row_bytes, options)
        moved += side * channels * (gradient_bytes if spans == 1 else 4 * spans)
        backward["contrastive_backward_gradient_kernel"] += moved
        if spans > 1:
            backward["partial_sums_backward_kernel"] += float32_sum_bytes(
                spans, side * channels, gradient_bytes
            )
        floor_backward += 2 * row_bytes * side + 8 * side + blocks * other * (row_bytes + 8)
    return Traffic(forward, dict(backward), Floor(floor_forward, floor_backward))


def _forward_bytes(
    image: torch.Tensor, texts: int, positives: Positives, options: dict[str, int]
) -> dict[str, int]:
    images, element = image.shape[0], image.element_size()
    blocks = triton.cdiv(images, options["rows"])
    bands = triton.cdiv(blocks, _BAND)
    spans, _ = _spans(min(blocks, _BAND), texts, options["columns"], _FORWARD_SPANS, image)
    text_tiles = triton.cdiv(texts, options["columns"])
    kind = _KINDS[positives.kind]
    # A row's and a column's largest logit and sum of exponentials, float32 each; the positive logits of a row.
    statistics = 8 * (spans * images + blocks * texts)
    if kind:
        statistics += 4 * spans * images * _positive_sums(image, positives)
    scale = 4 * blocks * spans
    label_keys = (positives.per_image if kind == 2 else 1, 1)
    return {
        "contrastive_forward_kernel": scale
        + element * _feature_reads(images, texts, blocks, spans, text_tiles, image.shape[1], options)
        + _positive_reads(positives, images, texts, blocks, text_tiles, label_keys, False)
        + statistics,
        # Every band of row blocks but the first is merged with what the ones before it gave.
        "contrastive_merge_forward_kernel": 8 * (blocks * texts + (2 * bands - 1) * texts)
        + 8 * (spans + 1) * images,
    }


def _side_bytes(
    side: int,
    other: int,
    spans: int,
    positives: Positives,
    is_text: bool,
    row_bytes: int,
    options: dict[str, int],
) -> int:
    """What the gradient kernel of one side moves but for the gradient itself."""
    blocks, tiles = triton.cdiv(side, options["rows"]), triton.cdiv(other, options["columns"])
    channel_blocks = options["D_BLOCKS"]
    # A program a block of channels needs all of a row for the similarities, and its own channels for the gradient.
    features = row_bytes * (spans * side + blocks * other)
    if channel_blocks > 1:
        features += channel_blocks * row_bytes * (tiles * side + blocks * other)
    # Three scalars a program; a log-sum-exp and a weight a row and a column.
    beside = 12 * blocks * spans + 8 * spans * side + 8 * blocks * other
    keys = _keys(_KINDS[positives.kind], positives.per_image, is_text)
    beside += _positive_reads(positives, side, other, blocks, tiles, keys, is_text)
    scale = 0 if is_text else 4 * spans * side
    return features + channel_blocks * beside + scale


def _feature_reads(
    rows: int, columns: int, blocks: int, spans: int, tiles: int, channels: int, options: dict[str, int]
) -> int:
    """Elements of features read forward: rows once a span, columns once a block of rows.

    If a tile does not hold all channels, rows come again for every tile of columns, after a first block of channels
    that the interpreter reads and a compiler drops.
    """
    if options["D_BLOCKS"] == 1:
        return channels * (spans * rows + blocks * columns)
    return options["BLOCK_D"] * spans * rows + channels * (tiles * rows + blocks * columns)


def _positive_reads(
    positives: Positives,
    rows: int,
    columns: int,
    blocks: int,
    tiles: int,
    keys: tuple[int, int],
    is_text: bool,
) -> int:
    """Bytes read to know what belongs together: soft targets, or labels with the weights of the texts'."""
    if positives.kind == "targets":
        assert positives.targets is not None
        return rows * columns * positives.targets.element_size()
    if positives.kind != "labels":
        return 0
    row_keys, column_keys = keys
    weights = 4 * (tiles * rows if is_text else blocks * columns)
    return 8 * row_keys * (tiles * rows + column_keys * blocks * columns) + weights
