"""``group_assign`` at the two grouping stages of GroupViT-S."""

from __future__ import annotations

import torch

from .. import group_assign, group_assign_reference
from ..group_assign.launch import bytes_moved
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes

# 224 x 224 pixels in patches of 16: 196 tokens into 64 groups, and those into 8; C = 384.
_MODELS: dict[str, Sizes] = {
    "GroupViT-S stage 1": {"B": 256, "G": 64, "N": 196, "C": 384},
    "GroupViT-S stage 2": {"B": 256, "G": 8, "N": 64, "C": 384},
}
_SEED = 20261


def _make(sizes: Sizes, maker: Maker) -> Inputs:
    B, G, N, C = (sizes[name] for name in "BGNC")
    return {
        "query": maker.normal(B, G, C),
        "key": maker.normal(B, N, C),
        "value": maker.normal(B, N, C),
    }


def _call(inputs: Inputs, backend: str) -> Run:
    names = ("query", "key", "value")
    seed = torch.tensor(_SEED, device=inputs["query"].device)
    return lambda: group_assign(*(inputs[name] for name in names), gumbel=True, seed=seed, backend=backend)[0]


def _reference(inputs: Inputs) -> Run:
    names = ("query", "key", "value")
    return lambda: group_assign_reference(*(inputs[name] for name in names), gumbel=True, seed=_SEED)[0]


def _eager(inputs: Inputs) -> Run:
    def run() -> torch.Tensor:
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        logits = query @ key.mT * query.shape[-1] ** -0.5
        noise = -torch.empty_like(logits).exponential_().log()
        soft = (logits + noise).softmax(dim=-2)
        hard = torch.zeros_like(soft).scatter_(-2, soft.argmax(dim=-2, keepdim=True), 1.0)
        weight = hard - soft.detach() + soft
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1.0)
        return weight @ value

    return run


def _floor(sizes: Sizes, pass_: Pass) -> int:
    inputs = _make(sizes, Maker(torch.bfloat16, "meta"))
    return getattr(bytes_moved(inputs["query"], inputs["key"]).floor, pass_)


def _flops(sizes: Sizes, pass_: Pass) -> int:
    product = 2 * sizes["B"] * sizes["G"] * sizes["N"] * sizes["C"]
    return product * (2 if pass_ == "forward" else 5)


OPERATIONS = [
    Operation(
        name="group_assign",
        models=_MODELS,
        make=_make,
        gradients=("query", "key", "value"),
        call=_call,
        eager=_eager,
        reference=_reference,
        floor=_floor,
        flops=_flops,
        copies=lambda sizes: sizes["B"],
    )
]
