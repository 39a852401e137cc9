"""Which image each token of a sequence may look at, from the ``<image>`` tokens in it.

Legend: B batch, T tokens, N images a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_ATTENTION = ("latest", "all_previous")


def image_attention_mask(
    input_ids: Tensor,
    image_token_id: int,
    eos_token_id: int | None,
    num_images: int,
    image_attention: str = "latest",
    document_ids: Tensor | None = None,
) -> Tensor:
    """Mask int64 [B, T, N], one where a token sees an image; image n is the row's n-th ``<image>`` token.

    A token sees the latest image at or before it; an end-of-sequence token still does, what follows it sees
    none until the next image.

    Args:
        input_ids: int [B, T].
        num_images: N; ``<image>`` tokens beyond it stand for no image, and show none.
        image_attention: ``"latest"``, or ``"all_previous"`` for every image since the last end of a sequence.
        document_ids: int [B, T], -1 for padding: a new document begins without images.

    Raises:
        ValueError: ``image_attention`` is not known.
    """
    if image_attention not in IMAGE_ATTENTION:
        raise ValueError(
            f"image_attention={image_attention!r} is not known; use {' or '.join(IMAGE_ATTENTION)}."
        )
    is_image = input_ids == image_token_id
    count = is_image.long().cumsum(1)  # images at or before each token
    # Images counted where the current stretch begins: only later ones are seen.
    before = torch.zeros_like(count)
    if eos_token_id is not None:
        ended = torch.where(input_ids == eos_token_id, count, 0).cummax(1).values
        before[:, 1:] = ended[:, :-1]
    if document_ids is not None:
        starts = torch.zeros_like(is_image)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        earlier = torch.where(starts, count - is_image.long(), 0).cummax(1).values
        before = torch.maximum(before, earlier)
    index = torch.arange(num_images, device=input_ids.device)
    latest = (count - 1)[:, :, None]
    first = before[:, :, None]
    if image_attention == "latest":
        seen = (index == latest) & (latest >= first)
    else:
        # Past the limit the latest image is missing, and a token that would see it sees nothing.
        seen = (index <= latest) & (index >= first) & (latest < num_images)
    if document_ids is not None:
        seen = seen & (document_ids >= 0)[:, :, None]
    return seen.long()
