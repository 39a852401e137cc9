"""``gated_residual`` and its form with the norm that follows, at the shapes of IDEFICS."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..gated_residual.op import (
    gated_residual,
    gated_residual_reference,
    gated_residual_rms_norm,
    gated_residual_rms_norm_reference,
)
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes, Tiles

# A = 1: one alpha a layer; A = C: one a channel.
_MODELS: dict[str, Sizes] = {
    "IDEFICS-9B": {"B": 4, "T": 2048, "C": 4096, "A": 1},
    "IDEFICS-80B": {"B": 4, "T": 2048, "C": 8192, "A": 1},
    "IDEFICS-9B, alpha [C]": {"B": 4, "T": 2048, "C": 4096, "A": 4096},
}
_EPS = 1e-6
_PERIOD = 128
"""A sixteenth of the rows takes no update, spread over the sequence with this period."""


def _make(sizes: Sizes, maker: Maker) -> Inputs:
    B, T, C = (sizes[name] for name in "BTC")
    row_mask = torch.ones(B, T, dtype=torch.bool, device=maker.device)
    row_mask[:, torch.arange(T, device=maker.device) % _PERIOD < _PERIOD // 16] = False
    return {
        "residual": maker.normal(B, T, C),
        "update": maker.normal(B, T, C),
        "alpha": maker.normal(sizes["A"], scale=0.5),
        "weight": maker.normal(C),
        "row_mask": row_mask,
    }


def _call(inputs: Inputs, backend: str) -> Run:
    names = ("residual", "update", "alpha", "row_mask")
    return lambda: gated_residual(*(inputs[name] for name in names), backend=backend)


def _reference(inputs: Inputs) -> Run:
    return lambda: gated_residual_reference(
        *(inputs[name] for name in ("residual", "update", "alpha", "row_mask"))
    )


def _eager(inputs: Inputs) -> Run:
    return lambda: _gate(inputs)


def _gate(inputs: Inputs) -> torch.Tensor:
    update = inputs["update"].masked_fill(~inputs["row_mask"][..., None], 0.0)
    return inputs["residual"] + torch.tanh(inputs["alpha"]) * update


def _call_norm(inputs: Inputs, backend: str) -> Run:
    names = ("residual", "update", "alpha", "weight", "row_mask")
    return lambda: gated_residual_rms_norm(*(inputs[name] for name in names), norm_eps=_EPS, backend=backend)


def _reference_norm(inputs: Inputs) -> Run:
    names = ("residual", "update", "alpha", "weight", "row_mask")
    return lambda: gated_residual_rms_norm_reference(*(inputs[name] for name in names), norm_eps=_EPS)


def _eager_norm(inputs: Inputs) -> Run:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        summed = _gate(inputs)
        wide = summed.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
        return summed, inputs["weight"] * normed.to(summed.dtype)

    return run


def _library_norm(inputs: Inputs) -> Run:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        summed = _gate(inputs)
        return summed, F.rms_norm(summed, summed.shape[-1:], inputs["weight"], _EPS)

    return run


def _floor(maps: dict[Pass, int], spared: dict[Pass, int], vectors: int) -> Any:
    def floor(sizes: Sizes, pass_: Pass, tiles: Tiles) -> int:
        rows, C, A = sizes["B"] * sizes["T"], sizes["C"], sizes["A"]
        dead = sizes["B"] * (sizes["T"] // 16)  # rows that take no update spare some maps
        # Maps of two bytes an element, the mask of one byte a row, alpha (and weight) and their gradients.
        size = 2 * C * (maps[pass_] * rows - spared[pass_] * dead) + rows
        return size + 2 * (A + vectors * C) * (1 if pass_ == "forward" else 2)

    return floor


OPERATIONS = [
    Operation(
        name="gated_residual",
        models=_MODELS,
        make=_make,
        gradients=("residual", "update", "alpha"),
        call=_call,
        eager=_eager,
        reference=_reference,
        # Backward reads the gradient of out and the update, and writes the gradient of the update; that of
        # the residual is the gradient of out itself.
        floor=_floor({"forward": 3, "backward": 3}, {"forward": 1, "backward": 2}, vectors=0),
        flops=lambda sizes, pass_: 0,
        copies=lambda sizes: sizes["B"] * sizes["T"] // _PERIOD,
        matrix=False,
    ),
    Operation(
        name="gated_residual_rms_norm",
        models=_MODELS,
        make=_make,
        gradients=("residual", "update", "alpha", "weight"),
        call=_call_norm,
        eager=_eager_norm,
        reference=_reference_norm,
        rivals={"F.rms_norm": _library_norm},
        # Backward reads two gradients, the sum and the update, and writes two gradients.
        floor=_floor({"forward": 4, "backward": 6}, {"forward": 1, "backward": 1}, vectors=1),
        flops=lambda sizes, pass_: 0,
        copies=lambda sizes: sizes["B"] * sizes["T"] // _PERIOD,
        matrix=False,
    ),
]
