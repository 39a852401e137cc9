"""Which token looks at which image, in the form the gated blocks take.

The images of a whole batch are laid end to end, as one row of U images, and the batch's B * T tokens as one
row of tokens: images that no token looks at can then be left out altogether, and cached ones are simply
indexed.

Legend: B batch, T tokens, N images a row, U images kept, L keys an image, E image width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import prepare_image_mask
from ...kernels.cross_attention.image_lists import ImageLists
from .cache import FocusedImages, ImageCache, ImageFocus


@dataclass
class ImageContext:
    """Images as one forward pass sees them.

    Attributes:
        states: [U * L, E] to be projected by every gated block; None when the cache holds the projections.
        numbers: int64 [U], which images of the run they are; where there is noise to draw for them.
        lists: token to image lists over [1, B * T] tokens and U images.
        dense_mask: bool [B, 1, T, N * L], only where attention dropout needs probabilities.
        cache: where projections are taken from, or put.
        focus: takes from the projections what later steps look at.
        focused: projections of just the images a decoding step looks at, which replaces all of the above.
    """

    image_length: int
    states: Tensor | None = None
    numbers: Tensor | None = None
    lists: ImageLists | None = None
    dense_mask: Tensor | None = None
    cache: ImageCache | None = None
    focus: ImageFocus | None = None
    focused: FocusedImages | None = None


def cut_at_documents(seen: Tensor, document_ids: Tensor) -> Tensor:
    """Let tokens see only images of their own document: bool [B, T, N], int [B, T] -> bool [B, T, N].

    An image belongs to the document of the first token that looks at it, which is its own ``<image>`` token.
    """
    first = seen.int().argmax(dim=1)  # [B, N]
    owner = document_ids.gather(1, first)
    return seen & (document_ids[:, :, None] == owner[:, None]) & (document_ids >= 0)[:, :, None]


def image_slots(seen: Tensor, keep_all: bool) -> Tensor:
    """Place of each image [B, N] among the U that are kept, -1 for those no token looks at; U is at least
    one.
    """
    batch, _, per_row = seen.shape
    if keep_all:
        return torch.arange(batch * per_row, device=seen.device).view(batch, per_row)
    used = seen.any(1).flatten()
    used[0] |= ~used.any()
    return torch.where(used, used.cumsum(0) - 1, -1).view(batch, per_row)


def flat_lists(seen: Tensor, slots: Tensor, images: int, real: Tensor | None = None) -> ImageLists:
    """Lists over [1, B * T] tokens from bool [B, T, N] and the slots [B, N] of its images; over [1, R] tokens
    where ``real`` int64 [R] picks them.
    """
    batch, tokens, per_row = seen.shape
    if not torch.compiler.is_compiling() and not bool((seen.sum(-1) > 1).any()):
        index = seen.int().argmax(-1) if per_row else seen.new_zeros(batch, tokens, dtype=torch.long)
        place = slots.gather(1, index) if per_row else index
        flat = torch.where(seen.any(-1), place, -1).view(1, -1)
        flat = flat if real is None else flat[:, real]
        return prepare_image_mask(flat, images=images)
    rows = torch.arange(batch, device=seen.device)
    full = seen.new_zeros(batch, tokens, batch, per_row)
    full[rows, :, rows] = seen
    full = full.view(1, batch * tokens, -1)
    full = full if real is None else full[:, real]
    if images != batch * per_row:
        full = full[:, :, (slots.flatten() >= 0).nonzero().flatten()]
    return prepare_image_mask(full)
