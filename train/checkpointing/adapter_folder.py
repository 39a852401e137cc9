"""A folder of low-rank adapters in ``peft``'s format: written, or read as its base model with them merged in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...models.checkpoint import read_bin, read_safetensors
from ...models.idefics.adapters import beside_adapters, merge_saved_adapters
from .frozen_base import QUANTIZATION, FrozenBase, lasting, quantization_file

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_(A|B)\.(weight|default\.weight)$")
# What would have to be merged in another way, and the values that ask for nothing.
_PLAIN = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "megatron_config": (),
    "trainable_token_indices": (),
    "layer_replication": (),
    "target_parameters": ([],),
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        ValueError: it cannot be read, or asks for adapters that are not merged here (named).
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); restore it.") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        kind = values.get("peft_type") if isinstance(values, dict) else None
        raise ValueError(
            f"{path} is of peft_type {kind!r}; only LORA is merged here: merge it with peft and save."
        )
    asked = [
        f"{name}={values[name]!r}"
        for name, neutral in _PLAIN.items()
        if values.get(name) is not None and values[name] not in neutral
    ]
    if asked:
        raise ValueError(
            f"{path} asks for {', '.join(asked)}, which is not merged here: merge it with peft (merge_and_unload) "
            "and save the model."
        )
    return values


def base_of(folder: Path) -> str:
    """The checkpoint that the adapters stand on; a relative path may be relative to the folder.

    Raises:
        ValueError: the configuration names none.
    """
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{folder / CONFIG} has no base_model_name_or_path; write the checkpoint that the adapters were trained on "
            "there."
        )
    beside = folder / name
    return str(beside) if not Path(name).exists() and beside.exists() else name


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder of adapters.

    Raises:
        ValueError: there are none, or the file is damaged.
    """
    for name, read in (("adapter_model.safetensors", read_safetensors), ("adapter_model.bin", read_bin)):
        if (folder / name).is_file():
            return dict(read(folder / name))
    raise ValueError(f"{folder} has no adapter_model.safetensors; give the folder that peft saved.")


def merge(
    weights: dict[str, Tensor], adapters: dict[str, Tensor], scale: float, source: str
) -> dict[str, Tensor]:
    """``weights`` with the adapters added, and with what was trained whole beside them (``modules_to_save``).

    Raises:
        ValueError: an adapter or a weight belongs to no weight of the model, or has another shape.
    """
    merged = dict(weights)
    halves: dict[str, Tensor] = {}
    odd = []
    for name, value in adapters.items():
        own = plain_name(name)
        match = _LORA.search(own)
        module = own[: match.start()] if match else None
        if module is not None and match is not None:
            target = merged.get(f"{module}.weight")
            side = 1 if match[1] == "A" else 0
            fits = target is not None and value.dim() == 2 and value.shape[side] == target.shape[side]
            halves[f"{module}.lora_{match[1]}.default.weight"] = value
        else:
            fits = own in merged and merged[own].shape == value.shape
            if fits:
                merged[own] = value.to(merged[own].dtype)
        if not fits:
            odd.append(name)
    if odd:
        raise ValueError(
            f"{source} holds adapters that do not fit its base model: {', '.join(sorted(odd)[:5])}"
            f"{' …' if len(odd) > 5 else ''}; correct base_model_name_or_path in {CONFIG}."
        )
    return merge_saved_adapters({**beside_adapters(merged, halves), **halves}, scale, source)


def plain_name(name: str) -> str:
    """The name that a weight of such a folder has, or stands beside, in the model."""
    return name.removeprefix(_PREFIX).replace(".modules_to_save.default", "").replace(".modules_to_save", "")


@dataclass(frozen=True)
class AdapterExport:
    """What a run writes that exports its adapters alone.

    Attributes:
        weights: the trained model's state dict, whole; frozen ones are not written.
        settings: arguments of ``peft.LoraConfig``.
        source: the checkpoint that the adapters stand on.
        model: the trained one.
        base: how its frozen weights are stored, where they are quantised.
    """

    weights: Mapping[str, Tensor]
    settings: dict[str, Any]
    source: str
    model: nn.Module
    base: FrozenBase | None

    def tensors(self) -> dict[str, Tensor]:
        """What is written, under ``peft``'s names; what trained whole has those of the model."""
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return {
            _PREFIX + name.replace(".default.", "."): self.weights[name].detach().cpu().contiguous()
            for name in trained
        }

    def write(self, folder: Path) -> None:
        """Write ``adapter_config.json``, ``adapter_model.safetensors`` and, of a quantised base, what it is."""
        from peft import LoraConfig
        from safetensors.torch import save

        config = LoraConfig(
            **self.settings, base_model_name_or_path=lasting(self.source), inference_mode=True
        )
        config.save_pretrained(str(folder))
        (folder / "adapter_model.safetensors").write_bytes(save(self.tensors(), {"format": "pt"}))
        if self.base is not None:
            (folder / QUANTIZATION).write_text(quantization_file(self.base, self.model), encoding="utf-8")
