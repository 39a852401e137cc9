"""Cross-attention from tokens to the images that each token may look at.

    out[b, h, t] = sum_s softmax_s(scale * query[b, h, t] . key[b, h, s]) value[b, h, s]

over the keys s of the images that token t sees (image n owns keys n * L to (n + 1) * L - 1); exactly zero, with
zero gradient, for a token that sees none. This is the attention of Flamingo (Alayrac et al. 2022, section 2.2) and
IDEFICS (Laurençon et al. 2023). Their gate on rows without an image stands after a bias-free output projection,
with which setting those rows to zero here commutes; tanh(alpha) is applied by ``gated_residual``.

Cost in FLOPs, with V pairs (token, image) visited in the batch, tokens rounded up to steps: 4 V L D H forward and
10 V L D H backward where a token sees one image of few keys; else 14 V L D H backward (five products, of which two are
made in both its kernels). In bytes: ``launch.bytes_moved``.

The dense [T, N * L] mask is never built, an image no token of a tile sees is never loaded, tiles in which all
tokens agree are not masked. The backward pass uses no atomics: repeated runs are bitwise equal.

Legend: B batch, H heads, T tokens, N images, L ``image_length``, S = N * L keys, D head dim.
"""

from __future__ import annotations

import math

import torch

from ..common.backend import backend_for, calls_directly, fall_back, outside_autocast, refuse_forward_mode
from . import launch, torch_path
from .image_lists import ImageLists, build_image_lists, check_image_mask, dense_image_mask, prepare_image_mask

_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_WIDEST = 128  # head dims whose tiles fit the registers and the shared memory of every supported GPU


def gated_cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_mask: torch.Tensor | ImageLists,
    *,
    image_length: int,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend from tokens to the images that each may look at; rows without an image are exactly zero.

    Args:
        query: [B, H, T, D] floating point.
        key: [B, H, N * image_length, D], the images one after another.
        value: [B, H, N * image_length, D].
        image_mask: bool [B, T, N], true where a token sees an image; or integer [B, T], the index of the one image
            a token sees, -1 for none; or either of them prepared once for all layers by ``prepare_image_mask``.
        image_length: L, keys per image.
        scale: multiplies the scores; D**-0.5 by default.
        backend: ``"auto"`` (Triton on a GPU, PyTorch elsewhere), ``"triton"`` or ``"torch"``. Head dims above 128
            always take PyTorch, and say so once in the log.

    Returns:
        [B, H, T, D] in the dtype of ``query``. Under autocast the three inputs are first cast to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices disagree, the mask is of the wrong kind, or an index is outside
            [-1, N).
    """
    if isinstance(query, torch.Tensor) and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    images = _check(query, key, value, image_mask, image_length)
    refuse_forward_mode("gated_cross_attention", query, key, value)
    triton = backend_for(backend, "query", query) == "triton"
    if triton and query.shape[-1] > _WIDEST:
        fall_back(
            f"gated_cross_attention was given a head dim of {query.shape[-1]} and they take up to {_WIDEST}"
        )
        triton = False
    if not isinstance(image_mask, ImageLists):
        image_mask = prepare_image_mask(image_mask, images=images, backend="triton" if triton else "torch")
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if calls_directly(triton, query):
        mask = _lists(*image_mask.tensors, images, triton).mask  # pyright: ignore[reportCallIssue]
        return torch_path.forward(query, key, value, mask, images, image_length, factor)[0]
    return _attend(query, key, value, *image_mask.tensors, images, image_length, factor, triton)[0]


def gated_cross_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_mask: torch.Tensor | ImageLists,
    *,
    image_length: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Plain definition with the dense mask, in float32 (float64 for float64); see ``gated_cross_attention``."""
    images = _check(query, key, value, image_mask, image_length)
    if not isinstance(image_mask, ImageLists):
        image_mask = prepare_image_mask(image_mask, images=images, backend="torch")
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor: float = query.shape[-1] ** -0.5 if scale is None else scale
    seen = dense_image_mask(image_mask).repeat_interleave(image_length, dim=2)[:, None]  # [B, 1, T, S]
    score = torch.matmul(query.to(exact), key.to(exact).mT) * factor
    score = score.masked_fill(~seen, -math.inf)
    has_image = seen.any(-1, keepdim=True)
    weight = score.masked_fill(~has_image, 0.0).softmax(-1) * has_image
    return (weight @ value.to(exact)).to(query.dtype)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_mask: torch.Tensor | ImageLists,
    image_length: int,
) -> int:
    """Return the number of images, or raise ValueError naming the argument that is wrong."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {given}; give a tensor [B, H, length, D].")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; give float16, bfloat16, float32 or float64.")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype} but query is {query.dtype}; cast them to one dtype.")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} but query is on {query.device}; move them together."
            )
    batch, heads, tokens, width = query.shape
    if isinstance(image_length, bool) or not isinstance(image_length, int) or image_length < 1:
        raise ValueError(
            f"image_length={image_length!r}; give the number of keys per image, an integer of 1 or more."
        )
    if key.shape[:2] != (batch, heads) or key.shape[3] != width:
        raise ValueError(
            f"key has shape {tuple(key.shape)} but query {tuple(query.shape)}; B, H and D must be the same."
        )
    if value.shape != key.shape:
        raise ValueError(
            f"value has shape {tuple(value.shape)} but key {tuple(key.shape)}; make them the same."
        )
    if key.shape[2] % image_length:
        raise ValueError(f"key has {key.shape[2]} keys, not a multiple of image_length={image_length}.")
    images = key.shape[2] // image_length
    if isinstance(image_mask, ImageLists):
        if image_mask.images != images:
            raise ValueError(
                f"image_mask was prepared for {image_mask.images} images but key has {images} of {image_length} keys."
            )
        mask = image_mask.mask
    else:
        mask = image_mask
        given = check_image_mask(mask, images if _is_integer(mask) else None)
        if given != images:
            raise ValueError(
                f"image_mask has {given} images but key has {images} of image_length={image_length} keys."
            )
    if mask.shape[:2] != (batch, tokens):
        raise ValueError(
            f"image_mask has shape {tuple(mask.shape)} but query has B={batch}, T={tokens}; its first two "
            "dimensions must be B and T."
        )
    if mask.device != query.device:
        raise ValueError(
            f"image_mask is on {mask.device} but query is on {query.device}; move them together."
        )
    return images


def _is_integer(mask: object) -> bool:
    """Whether a mask is a tensor of anything but booleans (so that it cannot say how many images there are)."""
    return isinstance(mask, torch.Tensor) and mask.dtype != torch.bool


def _lists(
    mask: torch.Tensor,
    rows: torch.Tensor,
    tile_images: torch.Tensor,
    tile_counts: torch.Tensor,
    image_tiles: torch.Tensor,
    image_counts: torch.Tensor,
    images: int,
    triton: bool,
) -> ImageLists:
    """The lists as given, or built here when the mask came unprepared (traced, or prepared for PyTorch)."""
    if mask.dtype == torch.bool or (mask.dim() == 2 and (mask.dtype != torch.int32 or rows.numel() == 0)):
        return build_image_lists(mask, images, tiled=triton)
    if triton and rows.numel() == 0:
        seen = dense_image_mask(
            ImageLists(mask, images, rows, tile_images, tile_counts, image_tiles, image_counts)
        )
        return build_image_lists(seen, images, tiled=True)
    return ImageLists(mask, images, rows, tile_images, tile_counts, image_tiles, image_counts)


@torch.library.custom_op("interloom::gated_cross_attention", mutates_args=())
@outside_autocast
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    tile_images: torch.Tensor,
    tile_counts: torch.Tensor,
    image_tiles: torch.Tensor,
    image_counts: torch.Tensor,
    images: int,
    image_length: int,
    scale: float,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lists = _lists(mask, rows, tile_images, tile_counts, image_tiles, image_counts, images, triton)
    if not triton:
        return torch_path.forward(query, key, value, lists.mask, images, image_length, scale)
    return launch.forward(query, key, value, lists, image_length, scale)


@_attend.register_fake
def _(
    query, key, value, mask, rows, tile_images, tile_counts, image_tiles, image_counts, images, image_length, scale,
    triton,
):  # fmt: skip
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    kept = (2, *query.shape[:3]) if triton else query.shape[:3]
    return query.new_empty(query.shape), query.new_empty(kept, dtype=exact)


@torch.library.custom_op("interloom::gated_cross_attention_backward", mutates_args=())
@outside_autocast
def _attend_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    mask: torch.Tensor,
    rows: torch.Tensor,
    tile_images: torch.Tensor,
    tile_counts: torch.Tensor,
    image_tiles: torch.Tensor,
    image_counts: torch.Tensor,
    images: int,
    image_length: int,
    scale: float,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lists = _lists(mask, rows, tile_images, tile_counts, image_tiles, image_counts, images, triton)
    if not triton:
        return torch_path.backward(
            grad, query, key, value, out, statistics, lists.mask, images, image_length, scale
        )
    return launch.backward(grad, query, key, value, out, statistics, lists, image_length, scale)


@_attend_backward.register_fake
def _(
    grad, query, key, value, out, statistics, mask, rows, tile_images, tile_counts, image_tiles, image_counts, images,
    image_length, scale, triton,
):  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    query, key, value, *lists, images, image_length, scale, triton = inputs
    ctx.save_for_backward(query, key, value, *output, *lists)
    ctx.arguments = (images, image_length, scale, triton)


def _differentiate(ctx, grad, _):
    query, key, value, out, statistics, *lists = ctx.saved_tensors
    grads = _attend_backward(grad, query, key, value, out, statistics, *lists, *ctx.arguments)
    return (*grads, *([None] * 10))


_attend.register_autograd(_differentiate, setup_context=_save)
