"""Which images each tile of tokens looks at, worked out once per batch and shared by every layer.

A token's images are kept compactly: one int32 index when every token sees at most one image, else one bit an
image in 64-bit words. From that come, for tiles of ``tile`` tokens, the list of images a tile must visit and its
transpose, the tiles an image must visit. Lists name first the *full* pairs, in which every token of the tile sees
the image and no masking is needed, then the partial ones.

With an index the tokens are first sorted by image, so that every tile has exactly one image: whatever the order
of the tokens, the work is that of T tokens with one image each, and what rounding the tokens of an image up to a
kernel's step adds.

Legend: B batch, T tokens, N images, W = ceil(N / 64) words, M tiles, R = ``tile`` rows in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.backend import resolve_backend

WORD = 64
INDEX_TILE = 128
WORDS_TILE = 128


@dataclass(frozen=True)
class ImageLists:
    """A checked image mask with its tile lists; made by :func:`prepare_image_mask`.

    Attributes:
        mask: int32 [B, T] image index (-1 for none), or int64 [B, T, W] words with bit ``n % 64`` of word
            ``n // 64`` set if the token sees image n; bool [B, T, N] only while a graph is being traced.
        images: N.
        rows: int32 [B, M, R] token of each row of each tile, -1 in unused rows.
        tile_images: int32 [B, M, N] (M, 1 with an index) images of a tile: the full ones, then the partial.
        tile_counts: int32 [B, M, 2] how many of these are full, and how many there are.
        image_tiles: int32 [B, N, M] tiles of an image: the full ones, then the partial.
        image_counts: int32 [B, N, 2] how many of these are full, and how many there are.

    The five lists are empty where nothing needs them (the PyTorch path).
    """

    mask: torch.Tensor
    images: int
    rows: torch.Tensor
    tile_images: torch.Tensor
    tile_counts: torch.Tensor
    image_tiles: torch.Tensor
    image_counts: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The mask and the five lists, in the order in which the operations take them."""
        return (
            self.mask,
            self.rows,
            self.tile_images,
            self.tile_counts,
            self.image_tiles,
            self.image_counts,
        )


def check_image_mask(image_mask: torch.Tensor, images: int | None) -> int:
    """Return the number of images of a mask whose kind and shape are right.

    Raises:
        ValueError: the kind or shape of ``image_mask`` is wrong, or it disagrees with ``images``.
    """
    if not isinstance(image_mask, torch.Tensor):
        raise ValueError(
            f"image_mask is a {type(image_mask).__name__}; give a bool tensor [B, T, N], an integer tensor [B, T] "
            "or the result of prepare_image_mask."
        )
    if image_mask.dtype == torch.bool:
        if image_mask.dim() != 3:
            raise ValueError(
                f"image_mask is bool with shape {tuple(image_mask.shape)}; a bool mask is [B, T, N], true where "
                "the token sees the image."
            )
        if images is not None and image_mask.shape[2] != images:
            raise ValueError(
                f"image_mask has {image_mask.shape[2]} images but images={images}; make the two agree."
            )
        return image_mask.shape[2]
    if image_mask.dtype not in {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}:
        raise ValueError(
            f"image_mask has dtype {image_mask.dtype}; give bool [B, T, N] or integer [B, T] (image index, -1 for "
            "no image); an additive float mask is not understood."
        )
    if image_mask.dim() != 2:
        raise ValueError(
            f"image_mask is {image_mask.dtype} with shape {tuple(image_mask.shape)}; an integer mask is [B, T], "
            "the index of each token's image or -1. For several images a token give bool [B, T, N]."
        )
    if images is None:
        raise ValueError("images is missing: an integer image_mask does not say how many images there are.")
    return images


def prepare_image_mask(
    image_mask: torch.Tensor, *, images: int | None = None, backend: str = "auto"
) -> ImageLists:
    """Check an image mask and build the lists that ``gated_cross_attention`` works from.

    Call it once per batch and give the result to every cross-attention layer as its ``image_mask``.

    Args:
        image_mask: bool [B, T, N], true where a token sees an image, or integer [B, T], the index of the one
            image a token sees or -1.
        images: N; needed with an integer mask.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``: the one the operation will run with.

    Raises:
        ValueError: the mask is of the wrong kind or shape, or an index is outside [-1, N).
    """
    count = check_image_mask(image_mask, images)
    tiled = resolve_backend(backend, image_mask) == "triton"
    if torch.compiler.is_compiling():
        # Values cannot be read while tracing: the operation builds its lists when it runs.
        return _untiled(image_mask, count)
    return build_image_lists(image_mask, count, tiled=tiled)


def build_image_lists(image_mask: torch.Tensor, images: int, *, tiled: bool) -> ImageLists:
    """Build lists from a mask of the right kind and shape (reads its values: one synchronisation)."""
    if image_mask.dtype == torch.bool:
        compact = _compact(image_mask)
    else:
        if image_mask.numel():
            low, high = (int(value) for value in torch.aminmax(image_mask))
            if low < -1 or high >= images:
                raise ValueError(
                    f"image_mask holds indices from {low} to {high}; with {images} images they must lie in "
                    f"[-1, {images - 1}], -1 meaning no image."
                )
        compact = image_mask.to(torch.int32).contiguous()
    if not tiled:
        return _untiled(compact, images)
    if compact.dim() == 2:
        return _index_lists(compact, images, INDEX_TILE)
    return _words_lists(compact, images, WORDS_TILE)


def tokens_of_image(words: torch.Tensor, image: int) -> torch.Tensor:
    """Return the int64 [tokens] positions of one batch row's words [T, W] that see ``image``."""
    return ((words[:, image // WORD] >> (image % WORD)) & 1).nonzero().flatten()


def dense_image_mask(lists: ImageLists) -> torch.Tensor:
    """Return the bool [B, T, N] form of a mask."""
    images = torch.arange(lists.images, device=lists.mask.device)
    if lists.mask.dtype == torch.bool:
        return lists.mask
    if lists.mask.dim() == 2:
        return lists.mask[:, :, None] == images
    return ((lists.mask[:, :, images // WORD] >> (images % WORD)) & 1).bool()


def _compact(seen: torch.Tensor) -> torch.Tensor:
    """bool [B, T, N] -> int32 [B, T] if no token sees two images, else int64 [B, T, W]."""
    batch, tokens, images = seen.shape
    if images == 0:
        return seen.new_full((batch, tokens), -1, dtype=torch.int32)
    if not bool((seen.sum(-1) > 1).any()):
        index = seen.int().argmax(-1)
        return torch.where(seen.any(-1), index, -1).to(torch.int32)
    words = -(-images // WORD)
    bits = torch.nn.functional.pad(seen, (0, words * WORD - images)).view(batch, tokens, words, WORD)
    shifts = torch.arange(WORD, device=seen.device)
    return (bits.long() << shifts).sum(-1)


def _untiled(mask: torch.Tensor, images: int) -> ImageLists:
    # One fresh tensor each: an operation's inputs may not be the same storage under torch.compile.
    return ImageLists(mask, images, *(mask.new_empty(0, dtype=torch.int32) for _ in range(5)))


def _index_lists(index: torch.Tensor, images: int, tile: int) -> ImageLists:
    batch, tokens = index.shape
    groups = images + 1  # the last one, of tokens without an image: its tiles write zeros and read nothing
    group_of_token = torch.where(index < 0, images, index).long()
    in_order, order = group_of_token.sort(dim=1, stable=True)
    edges = torch.arange(groups + 1, device=index.device).expand(batch, -1).contiguous()
    start = torch.searchsorted(in_order, edges)  # [B, groups + 1]
    tokens_in = start.diff(dim=1)
    tiles_in = (tokens_in + tile - 1) // tile
    last_tile = tiles_in.cumsum(1)
    first_tile = last_tile - tiles_in

    tiles = min(tokens, (tokens + groups * (tile - 1)) // tile)
    slot = torch.arange(tiles, device=index.device).expand(batch, -1).contiguous()
    group = torch.searchsorted(last_tile, slot, right=True)  # [B, M]; == groups in unused slots
    used = group < groups
    known = group.clamp(max=groups - 1)
    place = (slot - first_tile.gather(1, known))[:, :, None] * tile + torch.arange(tile, device=index.device)
    valid = used[:, :, None] & (place < tokens_in.gather(1, known)[:, :, None])
    position = (start.gather(1, known)[:, :, None] + place).clamp(max=max(tokens - 1, 0))
    rows = torch.where(valid, order.gather(1, position.flatten(1)).view_as(position), -1)

    seen = group < images
    image_tiles = first_tile[:, :images, None] + torch.arange(tiles, device=index.device)
    return ImageLists(
        index,
        images,
        rows.int(),
        torch.where(seen, group, 0).int()[:, :, None].contiguous(),
        seen.int()[:, :, None].repeat(1, 1, 2),
        image_tiles.int(),
        tiles_in[:, :images, None].int().repeat(1, 1, 2),
    )


def _words_lists(words: torch.Tensor, images: int, tile: int) -> ImageLists:
    batch, tokens = words.shape[:2]
    tiles = -(-tokens // tile)
    rows = torch.arange(tiles * tile, device=words.device)
    rows = torch.where(rows < tokens, rows, -1).int().view(1, tiles, tile).repeat(batch, 1, 1)
    seen = dense_image_mask(_untiled(words, images))
    extra = tiles * tile - tokens
    some = torch.nn.functional.pad(seen, (0, 0, 0, extra)).view(batch, tiles, tile, images).any(2)
    every = (
        torch.nn.functional.pad(seen, (0, 0, 0, extra), value=True).view(batch, tiles, tile, images).all(2)
    )
    every &= some
    # 0 full, 1 partial, 2 not looked at: a stable sort keeps images, and tiles, in ascending order in each class.
    rank = 2 - some.int() - every.int()
    return ImageLists(
        words,
        images,
        rows,
        rank.argsort(dim=2, stable=True).int().contiguous(),
        torch.stack([every.sum(2), some.sum(2)], -1).int(),
        rank.transpose(1, 2).argsort(dim=2, stable=True).int().contiguous(),
        torch.stack([every.sum(1), some.sum(1)], -1).int(),
    )
