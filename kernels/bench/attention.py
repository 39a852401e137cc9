"""``gated_cross_attention`` at the shapes of IDEFICS, and what people use instead."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..cross_attention.image_lists import build_image_lists, prepare_image_mask
from ..cross_attention.launch import bytes_moved
from ..cross_attention.op import gated_cross_attention, gated_cross_attention_reference
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes

# Alayrac-style resampler: 64 latents an image; a head dim of 128 in both sizes.
_MODELS: dict[str, Sizes] = {
    "IDEFICS-9B": {"B": 4, "H": 32, "T": 2048, "N": 8, "L": 64, "D": 128},
    "IDEFICS-80B": {"B": 4, "H": 64, "T": 2048, "N": 8, "L": 64, "D": 128},
}


def image_positions(sizes: Sizes) -> list[int]:
    """First token of each image's stretch: about even, off the edges of tiles; before it none is seen."""
    tokens, images = sizes["T"], sizes["N"]
    stretch = tokens / images
    return [int((n + 0.18 + 0.23 * (n % 3)) * stretch) + 1 for n in range(images)]


def _index(sizes: Sizes, device: torch.device) -> torch.Tensor:
    """Image that each token sees, the last one before it, or -1: int32 [B, T], the same in every row."""
    starts = torch.tensor(image_positions(sizes))
    index = torch.searchsorted(starts, torch.arange(sizes["T"]), right=True) - 1
    return index.to(torch.int32).to(device).repeat(sizes["B"], 1)


def _mask(sizes: Sizes, device: torch.device, several: bool) -> torch.Tensor:
    """Each token's image, or bool [B, T, N]: all images up to that."""
    index = _index(sizes, device)
    return index[..., None] >= torch.arange(sizes["N"], device=device) if several else index


def _make(several: bool) -> Any:
    def make(sizes: Sizes, maker: Maker) -> Inputs:
        B, H, T, D = (sizes[name] for name in "BHTD")
        S = sizes["N"] * sizes["L"]
        mask = _mask(sizes, maker.device, several)
        images = torch.arange(sizes["N"], device=maker.device)
        seen = mask if several else mask[..., None] == images
        return {
            "query": maker.normal(B, H, T, D),
            "key": maker.normal(B, H, S, D),
            "value": maker.normal(B, H, S, D),
            "mask": mask,
            "seen": seen,
            "images": sizes["N"],
            "image_length": sizes["L"],
        }

    return make


def _call(inputs: Inputs, backend: str) -> Run:
    # Models build the lists once a batch and use them in every layer, so they stand outside what is measured.
    lists = prepare_image_mask(inputs["mask"], images=inputs["images"], backend=backend)
    return lambda: gated_cross_attention(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        lists,
        image_length=inputs["image_length"],
        backend=backend,
    )


def _reference(inputs: Inputs) -> Run:
    return lambda: gated_cross_attention_reference(
        inputs["query"], inputs["key"], inputs["value"], inputs["mask"], image_length=inputs["image_length"]
    )


def dense_mask(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask of every (token, key) pair, bool [B, 1, T, S], and of the tokens with an image, bool [B, 1, T, 1].

    Rows without an image are let see everything, as softmax needs something; the second mask zeroes them.
    """
    seen = inputs["seen"].repeat_interleave(inputs["image_length"], dim=2)[:, None]
    has_image = seen.any(-1, keepdim=True)
    return seen | ~has_image, has_image


def _eager(inputs: Inputs) -> Run:
    allowed, has_image = dense_mask(inputs)

    def run() -> torch.Tensor:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        score = query @ key.mT * query.shape[-1] ** -0.5
        weight = score.masked_fill(~allowed, torch.finfo(score.dtype).min).softmax(-1, dtype=torch.float32)
        return (weight.to(value.dtype) @ value).masked_fill(~has_image, 0.0)

    return run


def sdpa(inputs: Inputs) -> Run:
    """``F.scaled_dot_product_attention`` with the dense mask."""
    allowed, has_image = dense_mask(inputs)
    return lambda: F.scaled_dot_product_attention(
        inputs["query"], inputs["key"], inputs["value"], attn_mask=allowed
    ).masked_fill(~has_image, 0.0)


def _flex(inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen, length = inputs["seen"], inputs["image_length"]
    B, T, N = seen.shape

    def sees(b: Any, h: Any, t: Any, s: Any) -> Any:
        return seen[b, t, s // length]

    blocks = create_block_mask(sees, B, None, T, N * length, device=str(seen.device))
    attention = torch.compile(flex_attention, dynamic=False)
    return lambda: attention(inputs["query"], inputs["key"], inputs["value"], block_mask=blocks)


def _varlen(inputs: Inputs) -> Run:
    """Each image with its tokens is a sequence of variable-length attention; here they stand together already."""
    from torch.nn.attention.varlen import varlen_attn

    index, images, length = inputs["mask"], inputs["images"], inputs["image_length"]
    counts = (index[..., None] == torch.arange(images, device=index.device)).sum(1).flatten()  # [B * N]
    edges = F.pad(counts.cumsum(0), (1, 0)).int()
    key_edges = torch.arange(0, counts.numel() * length + 1, length, device=index.device, dtype=torch.int32)
    longest, places = int(counts.max()), (index.flatten() >= 0).nonzero().flatten()

    def run() -> torch.Tensor:
        query, key, value = (inputs[name].transpose(1, 2).flatten(0, 1) for name in ("query", "key", "value"))
        out = varlen_attn(query[places], key, value, edges, key_edges, longest, length)
        B, H, T, D = inputs["query"].shape
        whole = query.new_zeros(B * T, H, D).index_copy(0, places, out)  # type: ignore[arg-type]
        return whole.view(B, T, H, D).transpose(1, 2)

    return run


_RIVALS = {"sdpa": sdpa, "flex_attention": _flex}


def _flops(several: bool) -> Any:
    def flops(sizes: Sizes, pass_: Pass) -> int:
        index = _index({**sizes, "B": 1}, torch.device("cpu"))[0]
        pairs = int((index + 1).sum() if several else (index >= 0).sum()) * sizes["L"]
        # Scores and their weighted sum forward; the scores again and four products backward.
        return (4 if pass_ == "forward" else 10) * sizes["B"] * sizes["H"] * pairs * sizes["D"]

    return flops


def _floor(several: bool) -> Any:
    def floor(sizes: Sizes, pass_: Pass) -> int:
        B, H, T, D = (sizes[name] for name in "BHTD")
        query = torch.empty(B, H, T, D, dtype=torch.bfloat16, device="meta")
        mask = _mask(sizes, torch.device("cpu"), several)
        lists = build_image_lists(mask, sizes["N"], tiled=True)
        return getattr(bytes_moved(query, lists, sizes["L"]).floor, pass_)

    return floor


def _operation(name: str, several: bool) -> Operation:
    return Operation(
        name=name,
        models=_MODELS,
        make=_make(several),
        gradients=("query", "key", "value"),
        call=_call,
        eager=_eager,
        reference=_reference,
        rivals=_RIVALS if several else _RIVALS | {"varlen_attn": _varlen},
        floor=_floor(several),
        flops=_flops(several),
        copies=lambda sizes: sizes["B"] * sizes["H"],
        floor_is="closed form: an image's keys and values are read once per tile that looks at it",
    )


OPERATIONS = [
    _operation("gated_cross_attention", several=False),
    _operation("gated_cross_attention/words", several=True),
]
