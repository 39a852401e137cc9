"""What generation keeps between tokens: keys and values of the text, and of the images.

Text keys live in buffers with room to grow, so a new token is written in place. Image keys and values are
projected once, when the images arrive, and kept flat [U * L, H, D] for the U images of the whole batch.

Legend: B batch, T new tokens, K tokens so far, N images a row, L keys an image, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """Keys and values [B, K, H, D] of one layer, in a buffer that doubles when it is full."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """[B, H, K, D] so far, as other caches call and lay them out."""
        return None if self.key is None else self.key[:, : self.length].transpose(1, 2)

    @property
    def values(self) -> Tensor | None:
        return None if self.value is None else self.value[:, : self.length].transpose(1, 2)

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, T, H, D] and return all keys and values so far [B, K, H, D]."""
        stop = self.length + key.shape[1]
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            # Autograd must not see its inputs overwritten.
            if self.key is not None and self.value is not None:
                key = torch.cat((self.key[:, : self.length], key), dim=1)
                value = torch.cat((self.value[:, : self.length], value), dim=1)
            self.key, self.value, self.length = key, value, stop
            return key, value
        if self.key is None and stop >= self.capacity:
            self.key, self.value, self.length = key, value, stop
            return key, value
        if self.key is None or self.value is None or self.key.shape[1] < stop:
            self._grow(key, max(stop, self.capacity, 2 * self.length))
        assert self.key is not None
        assert self.value is not None
        self.key[:, self.length : stop] = key
        self.value[:, self.length : stop] = value
        self.length = stop
        return self.key[:, :stop], self.value[:, :stop]

    def _grow(self, like: Tensor, capacity: int) -> None:
        for name in ("key", "value"):
            old: Tensor | None = getattr(self, name)
            new = like.new_empty(like.shape[0], capacity, *like.shape[2:])
            if old is not None:
                new[:, : self.length] = old[:, : self.length]
            setattr(self, name, new)

    def reorder(self, rows: Tensor, start: int) -> None:
        """Give row i what row ``rows[i]`` held from token ``start`` on; what precedes it is shared by
        them.
        """
        for buffer in (self.key, self.value):
            if buffer is not None and self.length > start:
                buffer[:, start : self.length] = buffer[:, start : self.length].index_select(0, rows)

    def expand(self, copies: int, capacity: int) -> None:
        """Repeat every row ``copies`` times, making room for ``capacity`` tokens."""
        for name in ("key", "value"):
            old: Tensor | None = getattr(self, name)
            if old is not None:
                new = old.new_empty(len(old) * copies, max(capacity, self.length), *old.shape[2:])
                new[:, : self.length] = old[:, : self.length].repeat_interleave(copies, 0)
                setattr(self, name, new)


class StaticLayerCache(LayerCache):
    """Keys and values in a buffer whose shape never changes; positions come from a tensor."""

    def __init__(self, capacity: int, position: Tensor) -> None:
        super().__init__(capacity)
        self.position = position

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write at ``position`` onwards and return the whole buffers [B, capacity, H, D]."""
        if self.key is None or self.value is None:
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self.key, self.value = key.new_zeros(shape), value.new_zeros(shape)
        where = self.position + torch.arange(key.shape[1], device=key.device)
        self.key.index_copy_(1, where, key)
        self.value.index_copy_(1, where, value)
        return self.key, self.value


@dataclass
class FocusedImages:
    """Keys and values of just the images that each row's next tokens look at, side by side.

    Attributes:
        layers: (key, value) [R, H, M * L, D] of every gated block; R rows share them with B = R * copies.
        mask: bool [R, 1, 1, M * L], false for the slots of rows that see fewer than M images; None if none
            do.
        row_mask: bool [B, 1], false for rows that see no image; None if all see one.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    row_mask: Tensor | None


class ImageFocus:
    """Gathers, from the keys of all images, those that each row's next tokens look at.

    Args:
        slots: int64 [B, N], place of each image among the U kept ones.
        seen: bool [B, N], what the next tokens see.
        image_length: L.
    """

    def __init__(self, slots: Tensor, seen: Tensor, image_length: int) -> None:
        self.count, self.length = seen.sum(1), image_length
        self.most = int(self.count.max())
        order = seen.int().argsort(dim=1, descending=True, stable=True)[:, : self.most]  # [B, M]
        self.slots = slots.gather(1, order).clamp(min=0)
        self.layers: list[tuple[Tensor, Tensor]] = []

    def add(self, key: Tensor, value: Tensor) -> None:
        """Take one gated block's keys and values [U * L, H, D]."""
        if self.most:
            key, value = (
                x.view(-1, self.length, *x.shape[1:])[self.slots].flatten(1, 2).transpose(1, 2).contiguous()
                for x in (key, value)
            )
            self.layers.append((key, value))

    def result(self, copies: int = 1) -> FocusedImages:
        """What was gathered, for ``copies`` rows a prompt."""
        mask, row_mask = None, None
        if not bool((self.count > 0).all()):
            row_mask = (self.count > 0).repeat_interleave(copies)[:, None]
        if self.most and int(self.count.min()) < self.most:
            # A row without any image keeps its first slot open: its result is finite and then gated away.
            used = torch.arange(self.most, device=self.count.device) < self.count.clamp(min=1)[:, None]
            mask = used.repeat_interleave(self.length, 1)[:, None, None]
        return FocusedImages(self.layers, mask, row_mask)


@dataclass
class ImageCache:
    """Projected images of a batch.

    Attributes:
        rows, per_row: B and N of the images as they were given.
        image_length: L.
        slots: int64 [B, N], place of each image among the U kept ones, -1 for images that were not encoded.
        seen: bool [B, N], what the last token saw: new tokens see the same unless they are told otherwise.
        layers: (key, value) [U * L, H, D] of every gated block.
    """

    rows: int
    per_row: int
    image_length: int
    slots: Tensor
    seen: Tensor
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """U, the images kept."""
        return len(self.layers[0][0]) // self.image_length


class IdeficsCache:
    """``past_key_values``: the text so far and the images, grown as needed.

    Args:
        num_layers: Decoder layers.
        capacity: Tokens to make room for at first.
    """

    static = False

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        self.layers: list[LayerCache] = [LayerCache(capacity) for _ in range(num_layers)]
        self.images: ImageCache | None = None
        # Set to int64 [B] token indices, it keeps only the images those tokens see, in ``focus``.
        self.keep_images_of: Tensor | None = None
        self.focus: ImageFocus | None = None
        self.key_mask: Tensor | None = None  # bool [B, K]; None while no token was padding
        self.batch_size: int | None = None

    @classmethod
    def of(cls, past: Any) -> IdeficsCache:
        """This class from itself; from a tuple of (key, value) [B, H, K, D] a layer, as older releases of Transformers
        return them; or from a cache of Transformers. The last two hold no images: give them again.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(past, IdeficsCache):
            return past
        layers = getattr(past, "layers", None)
        if layers and hasattr(layers[0], "keys"):
            past = [(layer.keys, layer.values) for layer in layers if layer.keys is not None]
        if not isinstance(past, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) >= 2 and all(isinstance(x, Tensor) for x in pair[:2])
            for pair in past
        ):
            raise ValueError(
                f"past_key_values is a {type(past).__name__}; pass the IdeficsCache that an earlier call returned, or "
                "a tuple of (key, value) for every layer, each [B, heads, tokens, width]."
            )
        cache = cls(len(past))
        for own, (key, value, *_) in zip(cache.layers, past, strict=True):
            if key.dim() != 4 or key.shape != value.shape:
                raise ValueError(
                    f"past_key_values holds keys {tuple(key.shape)} and values {tuple(value.shape)}; give both as [B, "
                    "heads, tokens, width]."
                )
            own.key, own.value, own.length = key.transpose(1, 2), value.transpose(1, 2), key.shape[2]
        if past:
            cache.batch_size = len(past[0][0])
        return cache

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(key, value) [B, H, K, D] of every layer; the images are not in it."""
        return tuple(self[index] for index in range(len(self)))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.layers[layer_idx].length if self.layers else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows as needed."""
        return -1

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K, D] of a layer so far."""
        layer = self.layers[index]
        assert layer.key is not None
        assert layer.value is not None
        return layer.key[:, : layer.length].transpose(1, 2), layer.value[:, : layer.length].transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))

    def reorder(self, rows: Tensor, start: int = 0) -> None:
        """Keep the beams ``rows`` int64 [B]; tokens before ``start`` are the same in all beams of a
        prompt.
        """
        for layer in self.layers:
            layer.reorder(rows, start)

    def expand(self, copies: int, capacity: int) -> None:
        """Repeat every row for ``copies`` beams; image keys are shared, not repeated."""
        for layer in self.layers:
            layer.expand(copies, capacity)
        if self.key_mask is not None:
            self.key_mask = self.key_mask.repeat_interleave(copies, 0)
        if self.images is not None:
            self.images.slots = self.images.slots.repeat_interleave(copies, 0)
            self.images.seen = self.images.seen.repeat_interleave(copies, 0)
        if self.batch_size is not None:
            self.batch_size *= copies


class StaticCache(IdeficsCache):
    """A cache of fixed shape, so that a compiled step is one graph whatever the length.

    Args:
        max_length: Tokens it can hold, prompt included.
    """

    static = True

    def __init__(
        self, num_layers: int, max_length: int, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(num_layers)
        self.max_length = max_length
        self.batch_size = batch_size
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.key_mask = torch.ones(batch_size, max_length, dtype=torch.bool, device=device)
        self.layers = [StaticLayerCache(max_length, self.position) for _ in range(num_layers)]

    @classmethod
    def adopt(cls, cache: IdeficsCache, max_length: int, key_mask: Tensor) -> StaticCache:
        """Go on from a cache that has grown to ``max_length`` with fixed shapes; bool key_mask [B,
        max_length].
        """
        static = cls(len(cache), max_length, len(key_mask), key_mask.device)
        static.key_mask = key_mask
        static.position.fill_(cache.get_seq_length())
        for own, grown in zip(static.layers, cache.layers, strict=True):
            for name in ("key", "value"):
                old: Tensor = getattr(grown, name)
                buffer = old.new_zeros(old.shape[0], max_length, *old.shape[2:])
                buffer[:, : grown.length] = old[:, : grown.length]
                setattr(own, name, buffer)
                setattr(grown, name, None)
        return static

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.position)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.max_length

    def reorder(self, rows: Tensor, start: int = 0) -> None:
        for layer in self.layers:
            for buffer in (layer.key, layer.value):
                if buffer is not None:
                    buffer[:, start:] = buffer[:, start:].index_select(0, rows)
