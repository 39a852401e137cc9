"""From the images a forward pass is given to what the gated blocks read.

Legend: B batch, T new tokens, N images a row, U images kept, S tokens of an encoded image, L keys an image
(latents of the resampler, or S), E image width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from .cache import IdeficsCache, ImageCache, ImageFocus
from .configuration import IdeficsConfig
from .image_context import ImageContext, cut_at_documents, flat_lists, image_slots
from .validation import check_image_inputs, check_image_mask

# Images that pass through a frozen encoder at a time: enough to keep the device busy, few in memory.
_FROZEN_IMAGES = {"cpu": 4}
_FROZEN_IMAGES_GPU = 64


@dataclass(frozen=True)
class ImageInputs:
    """Images as a forward pass is given them, in one of three forms, and who may see them.

    Attributes:
        pixel_values: [B, N, 3, height, width].
        encoder_embeddings: [B, N, S, E] of the image encoder.
        latents: [B, N, L, E] of the resampler.
        attention_mask: [B, T, N], nonzero where a token sees an image.
        skip_unseen: leave out images that no token sees.
    """

    pixel_values: Tensor | None = None
    encoder_embeddings: Tensor | None = None
    latents: Tensor | None = None
    attention_mask: Tensor | None = None
    skip_unseen: bool = False

    @property
    def form(self) -> str:
        if self.pixel_values is not None:
            return "pixels"
        return "encoded" if self.latents is None else "latents"


def read_images(
    config: IdeficsConfig,
    images: ImageInputs,
    encode: Callable[[Tensor, str, Noise | None], Tensor],
    *,
    batch: int,
    tokens: int,
    with_dropout: bool,
    cache: IdeficsCache | None = None,
    document_ids: Tensor | None = None,
    noise: Noise | None = None,
    real: Tensor | None = None,
) -> tuple[ImageContext | None, Tensor | None]:
    """Encode the images, unless the cache has them, and say who sees which (of the ``real`` tokens [R] only).

    Args:
        encode: images [U, …], their form and their noise to what the gated blocks read, [U, L, E].
        with_dropout: attention to images drops some of them, so that all stay and a dense mask is needed.

    Returns:
        What the gated blocks need, and the states [B, N, L, E] of all images, zero for those left out.
    """
    given = check_image_inputs(config, batch, images.pixel_values, images.encoder_embeddings, images.latents)
    stored = cache.images if cache is not None else None
    if stored is not None:
        return _cached_images(stored, given, images.attention_mask, batch, tokens), None
    if given is None:
        if images.attention_mask is not None and bool(images.attention_mask.any()):
            raise ValueError(
                "image_attention_mask lets tokens see images but no images were given; pass pixel_values "
                "(or embeddings), or leave the mask out for text."
            )
        return None, None
    seen = check_image_mask(images.attention_mask, batch, tokens, given.shape[1])
    if document_ids is not None:
        seen = cut_at_documents(seen, document_ids)
    keep_all = not images.skip_unseen or with_dropout
    slots = image_slots(seen, keep_all)
    kept = slots.flatten() if keep_all else (slots.flatten() >= 0).nonzero().flatten()
    chosen = given.flatten(0, 1) if keep_all else given.flatten(0, 1)[kept]
    if noise is not None:
        noise = replace(noise, rows=noise.parts(kept, given.shape[1]), tokens=None)
    states = encode(chosen, images.form, noise)  # [U, L, E]
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


def encode_images(
    vision: nn.Module,
    resampler: nn.Module | None,
    images: Tensor,
    form: str,
    noise: Noise | None,
    *,
    dtype: torch.dtype,
    interpolate: bool,
    recompute: bool,
) -> Tensor:
    """Images in whatever form they came [U, …] to what the gated blocks read [U, L, E].

    Args:
        vision: the image encoder, for pixels.
        resampler: None where the blocks read the encoder's tokens themselves.
        dtype: of embeddings that were made elsewhere.
        interpolate: accept pictures of another size than the encoder was built for.
        recompute: keep no activations of the resampler.
    """
    if form == "pixels":
        frozen = not torch.is_grad_enabled() or not any(p.requires_grad for p in vision.parameters())
        if images.is_floating_point():
            images = images.to(vision.dtype)  # type: ignore[arg-type]
        if frozen and not images.requires_grad and not torch.compiler.is_compiling():
            # In portions: many images in memory at once gain nothing where nothing is kept for backward.
            size = _FROZEN_IMAGES.get(images.device.type, _FROZEN_IMAGES_GPU)
            with torch.no_grad():
                parts = [
                    vision(part, interpolate, noise=own).last_hidden_state
                    for part, own in zip(images.split(size), _portions(noise, size), strict=False)
                ]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            images = vision(images, interpolate, noise=noise).last_hidden_state
    else:
        images = images.to(dtype)
    if resampler is None or form == "latents":
        return images
    if recompute:
        return checkpoint(resampler, images, use_reentrant=False)  # pyright: ignore
    return resampler(images)


def _portions(noise: Noise | None, size: int) -> Iterator[Noise | None]:
    """The noise of images in portions of ``size``."""
    if noise is None or noise.rows is None:
        yield from repeat(noise)
    else:
        yield from (replace(noise, rows=rows) for rows in noise.rows.split(size))
