"""``gated_residual`` and its form with the norm that follows, at the shapes of IDEFICS."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..common.arch import multiprocessors
from ..common.traffic import Traffic
from ..gated_residual.launch import bytes_moved, bytes_moved_rms_norm
from ..gated_residual.op import (
    gated_residual,
    gated_residual_reference,
    gated_residual_rms_norm,
    gated_residual_rms_norm_reference,
)
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes

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


def _floor(said: Callable[..., Traffic], **weight: int) -> Callable[[Sizes, Pass], int]:
    """The floor that ``said`` knows, for elements and parameters of two bytes."""

    def floor(sizes: Sizes, pass_: Pass) -> int:
        rows = sizes["B"] * sizes["T"]
        traffic = said(
            rows, sizes["C"], 2, gates=sizes["A"], gate_bytes=2, **weight,
            updated_rows=rows - sizes["B"] * (sizes["T"] // 16), processors=multiprocessors(torch.empty(0)),
        )  # fmt: skip
        return getattr(traffic.floor, pass_)

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
        floor=_floor(bytes_moved),
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
        floor=_floor(bytes_moved_rms_norm, weight_bytes=2),
        flops=lambda sizes, pass_: 0,
        copies=lambda sizes: sizes["B"] * sizes["T"] // _PERIOD,
        matrix=False,
    ),
]
