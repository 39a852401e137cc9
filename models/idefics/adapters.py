"""Adapters in saved weights: merged into the matrices that they change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_BASE, _ADAPTER = ".base_layer.", re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def merge_saved_adapters(weights: dict[str, Tensor], scale: float | None, source: str) -> dict[str, Tensor]:
    """The state dict of a run with adapters as the plain model's, as :func:`merged_state_dict` makes it.

    ``peft`` is not needed.

    Args:
        weights: as the run saved them; without adapters they are returned as they are.
        scale: ``alpha / rank`` of the run.
        source: names the checkpoint in errors.

    Raises:
        ValueError: the scale is not known, or an adapter is not there whole.
    """
    bases = [name for name in weights if _BASE in name]
    if not bases:
        return weights
    if scale is None:
        raise ValueError(
            f"checkpoint={source} holds adapters but not their scale, which only newer checkpoints keep; give the run "
            "directory, whose exported model has them merged."
        )
    merged = {
        name: value for name, value in weights.items() if not _ADAPTER.search(name) and _BASE not in name
    }
    for name in bases:
        merged[name.replace(_BASE, ".")] = base = weights[name]
        module, _, kind = name.partition(_BASE)
        if kind != "weight":
            continue
        down, up = (weights.get(f"{module}.lora_{part}.default.weight") for part in "AB")
        if down is None or up is None:
            raise ValueError(
                f"checkpoint={source} lacks the adapter of {module}; use a checkpoint that is whole."
            )
        delta = (up.float() @ down.float()) * scale
        merged[f"{module}.weight"] = (base.float() + delta).to(base.dtype)
    return merged


def beside_adapters(weights: Mapping[str, Tensor], adapters: Iterable[str]) -> dict[str, Tensor]:
    """A plain state dict in which the layers that ``adapters`` (names) stand beside have the names of base layers."""
    adapted = {name.split(".lora_")[0] for name in adapters if ".lora_" in name}

    def named(name: str) -> str:
        module, _, kind = name.rpartition(".")
        return f"{module}{_BASE}{kind}" if module in adapted else name

    return {named(name): value for name, value in weights.items()}


def in_one_dtype(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose floating-point tensors have one type: bfloat16 where frozen matrices are kept in it.

    A model of mixed types computes nothing outside autocast, where its products meet two of them.
    """
    floating = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(floating) < 2:
        return weights
    narrow = min(floating, key=lambda dtype: dtype.itemsize)
    return {name: t.to(narrow) if t.is_floating_point() else t for name, t in weights.items()}
