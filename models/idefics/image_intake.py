"""From the images a forward pass is given to what the gated blocks read.

Legend: B batch, T new tokens, N images a row, U images kept, S tokens of an encoded image, L keys an image
(latents of the resampler, or S), E image width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from .cache import IdeficsCache, ImageCache, ImageFocus
from .image_context import ImageContext, cut_at_documents, flat_lists, image_slots
from .validation import check_image_inputs, check_image_mask

if TYPE_CHECKING:
    from .modeling import IdeficsModel

# Images that pass through a frozen encoder at a time: enough to keep the device busy, few in memory.
_FROZEN_IMAGES = {"cpu": 4}
_FROZEN_IMAGES_GPU = 64


def read_images(
    model: IdeficsModel,
    batch: int,
    tokens: int,
    x: Tensor,
    pixel_values: Tensor | None,
    image_encoder_embeddings: Tensor | None,
    perceiver_embeddings: Tensor | None,
    image_attention_mask: Tensor | None,
    cache: IdeficsCache | None,
    document_ids: Tensor | None,
    interpolate_pos_encoding: bool,
    skip_unseen: bool,
    noise: Noise | None,
    real: Tensor | None = None,
) -> tuple[ImageContext | None, Tensor | None]:
    """Encode the images, unless the cache has them, and say who sees which (of the ``real`` tokens [R] only)."""
    given = check_image_inputs(
        model.config, batch, pixel_values, image_encoder_embeddings, perceiver_embeddings
    )
    stored = cache.images if cache is not None else None
    if stored is not None:
        return _cached_images(stored, given, image_attention_mask, batch, tokens), None
    if given is None:
        if image_attention_mask is not None and bool(image_attention_mask.any()):
            raise ValueError(
                "image_attention_mask lets tokens see images but no images were given; pass pixel_values "
                "(or embeddings), or leave the mask out for text."
            )
        return None, None
    seen = check_image_mask(image_attention_mask, batch, tokens, given.shape[1])
    if document_ids is not None:
        seen = cut_at_documents(seen, document_ids)
    with_dropout = model.training and model.config.dropout > 0
    keep_all = not skip_unseen or with_dropout
    slots = image_slots(seen, keep_all)
    images = given.flatten(0, 1)
    kept = slots.flatten() if keep_all else (slots.flatten() >= 0).nonzero().flatten()
    if not keep_all:
        images = images[kept]
    if noise is not None:
        noise = replace(noise, rows=noise.parts(kept, given.shape[1]), tokens=None)
    states = _encode(
        model,
        images.to(x.device),
        "pixels" if pixel_values is not None else "encoded" if perceiver_embeddings is None else "latents",
        interpolate_pos_encoding,
        noise,
    )  # [U, L, E]
    context = ImageContext(states.shape[1], states.flatten(0, 1), noise.rows if noise is not None else None)
    if with_dropout:
        context.dense_mask = seen.repeat_interleave(states.shape[1], 2)[:, None]
    else:
        context.lists = flat_lists(seen, slots, len(states), real)
    if cache is not None and cache.keep_images_of is not None:
        looked_at = seen[torch.arange(batch, device=seen.device), cache.keep_images_of]
        cache.focus = context.focus = ImageFocus(slots, looked_at, states.shape[1])
    elif cache is not None:
        cache.images = context.cache = ImageCache(
            batch, given.shape[1], states.shape[1], slots, seen[:, -1].clone()
        )
    if len(states) == slots.numel():
        return context, states.view(batch, -1, *states.shape[1:])
    shape = (slots.numel(), *states.shape[1:])
    return context, states.new_zeros(shape).index_copy(0, kept, states).view(batch, -1, *states.shape[1:])


def _cached_images(
    stored: ImageCache,
    given: Tensor | None,
    image_attention_mask: Tensor | None,
    batch: int,
    tokens: int,
) -> ImageContext:
    if given is not None and given.shape[1] != stored.per_row:
        raise ValueError(
            f"{given.shape[1]} images a row were given with a cache that holds {stored.per_row}; a "
            "cache keeps the images of its first call, so start a new one to change them."
        )
    if image_attention_mask is None:
        seen = stored.seen[:, None].expand(-1, tokens, -1)
    else:
        seen = check_image_mask(image_attention_mask, batch, tokens, stored.per_row)
        stored.seen.copy_(seen[:, -1])
    return ImageContext(stored.image_length, lists=flat_lists(seen, stored.slots, stored.count), cache=stored)


def _encode(model: IdeficsModel, images: Tensor, kind: str, interpolate: bool, noise: Noise | None) -> Tensor:
    """Images in whatever form they came [U, …] to what the gated blocks read [U, L, E]."""
    if kind == "pixels":
        frozen = not torch.is_grad_enabled() or not any(
            p.requires_grad for p in model.vision_model.parameters()
        )
        if images.is_floating_point():
            images = images.to(model.vision_model.dtype)
        if frozen and not images.requires_grad and not torch.compiler.is_compiling():
            size = _FROZEN_IMAGES.get(images.device.type, _FROZEN_IMAGES_GPU)
            with torch.no_grad():
                parts = [
                    model.vision_model(part, interpolate, noise=own).last_hidden_state
                    for part, own in zip(images.split(size), _portions(noise, size), strict=False)
                ]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            images = model.vision_model(images, interpolate, noise=noise).last_hidden_state
    else:
        images = images.to(model.dtype)
    if model.config.use_resampler and kind != "latents":
        if model.gradient_checkpointing and model.training and torch.is_grad_enabled():
            return checkpoint(model.perceiver_resampler, images, use_reentrant=False)  # pyright: ignore
        return model.perceiver_resampler(images)
    return images


def _portions(noise: Noise | None, size: int) -> Iterator[Noise | None]:
    """The noise of images in portions of ``size``."""
    if noise is None or noise.rows is None:
        yield from repeat(noise)
    else:
        yield from (replace(noise, rows=rows) for rows in noise.rows.split(size))
