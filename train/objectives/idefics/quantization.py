"""Which matrices of an IDEFICS are quantised, and the plain model out of one that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ....models.idefics import IdeficsForVisionText2Text
from ....models.idefics.adapters import _BASE, merge_saved_adapters
from ....models.idefics.quantized import (
    QuantizedLinear,
    Storage,
    library,
    plain_weight,
    quantize_layers,
)

# The head reads its weights itself; what it adds to the vocabulary is a few rows.
_NEVER = ("lm_head",)


def quantize_frozen(model: IdeficsForVisionText2Text, storage: Storage, skip: Sequence[str] = ()) -> None:
    """Store the linear layers that do not train as ``storage`` says, those beside adapters included.

    Args:
        skip: names of modules, or parts of names between dots, that are left as they are.

    Raises:
        ValueError: ``skip`` names nothing, a matrix is too narrow, nothing is frozen, or bitsandbytes is missing.
    """
    if not next(model.parameters()).is_meta:
        library()
    linear = {
        name: f".{name}.".replace(_BASE, ".")
        for name, module in model.named_modules()
        # A library's own subclass may read its weight itself, as attention pooling does.
        if type(module) is nn.Linear and ".lora_" not in name
    }
    if unknown := [part for part in skip if not any(f".{part}." in name for name in linear.values())]:
        raise ValueError(
            f"model.quantization.skip names {', '.join(unknown)}, and no layer of the model is called so; give names "
            "of modules as in released checkpoints, or parts of them (vision_model, o_proj)."
        )
    names = [
        name
        for name, shown in linear.items()
        if not model.get_submodule(name).weight.requires_grad  # type: ignore[union-attr]
        and not any(f".{part}." in shown for part in (*_NEVER, *skip))
    ]
    if not names:
        raise ValueError(
            f"model.quantize={storage.kind} finds no frozen matrix; freeze some (model.config.freeze_text_layers=true, "
            "or adapters with model.lora.rank), or set model.quantize=null."
        )
    quantize_layers(model, names, storage)


def merged_from_quantized(
    model: nn.Module, weights: Mapping[str, Tensor], scale: float | None
) -> dict[str, Tensor]:
    """The plain model's weights in bfloat16: what was stored is dequantised, each adapter added, rounded once.

    Args:
        model: the trained one, which knows how its layers are stored.
        weights: its state dict, whole.
        scale: ``alpha / rank`` of the adapters.
    """
    left = dict(weights)
    merged: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        part = {f"{name}.weight": plain_weight(left, f"{name}.", module)}
        if f"{name}.bias" in left:
            part[f"{name}.bias"] = left.pop(f"{name}.bias")
        if f".{name}.".endswith(_BASE):
            adapter = f"{name.removesuffix(_BASE[:-1])}.lora_"
            part |= {key: left.pop(key) for key in list(left) if key.startswith(adapter)}
        # One layer at a time: of a large model no second copy in float32 is ever whole.
        merged |= _narrow(merge_saved_adapters(part, scale, "the trained model"))
    return merged | _narrow(merge_saved_adapters(left, scale, "the trained model"))


def _narrow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().to(torch.bfloat16) if t.is_floating_point() else t for n, t in weights.items()}
