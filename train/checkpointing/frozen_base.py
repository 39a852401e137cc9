"""The frozen weights that a checkpoint leaves out: where they come from, and whether they still are what they were.

A run whose frozen matrices are quantised writes only what trains. Its checkpoint names the base: the checkpoint that
it was read from, how its matrices are stored, and a digest of all its stored bytes. Whoever reads the checkpoint makes
the base again and compares the digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.idefics.adapters import _BASE, beside_adapters
from ...models.idefics.quantized import (
    BLOCK_SIZES,
    COMPUTE_DTYPES,
    KINDS,
    PARTS,
    Storage,
    digest,
    quantize_layers,
    quantized_layers,
)
from ...models.received import read_settings

# Beside adapters that were trained on such a base.
QUANTIZATION = "quantization.json"


@dataclass(frozen=True)
class FrozenBase:
    """What a checkpoint says of the weights that it does not hold.

    Attributes:
        source: the checkpoint they were read from; None: they were drawn, or composed.
        storage: the fields of :class:`Storage`.
        modules: names of the layers that are stored so, as released checkpoints have them.
        narrowed: names of further layers that are kept in bfloat16.
        fingerprint: SHA-256 of the stored bytes, which a resumed run must have again.
        origin: the same of the weights before they were rounded, which no machine rounds otherwise.
    """

    source: str | None
    storage: dict[str, Any]
    modules: list[str]
    narrowed: list[str]
    fingerprint: str
    origin: str

    @classmethod
    def of(cls, model: nn.Module, source: str | None) -> FrozenBase | None:
        """The base of a prepared model, whole and not yet sharded; None where nothing in it is quantised."""
        layers = quantized_layers(model)
        if not layers:
            return None
        narrowed = [
            _plain(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16
        ]
        frozen = base_names(model)
        tensors = {name: value for name, value in model.state_dict().items() if name in frozen}
        return cls(
            source=None if source is None else lasting(source),
            storage=asdict(next(iter(layers.values())).storage),
            modules=sorted(layers),
            narrowed=sorted(narrowed),
            fingerprint=fingerprint(tensors),
            origin=fingerprint(tensors, {name: layer.origin for name, layer in layers.items()}),
        )

    @classmethod
    def from_dict(cls, values: Any, where: object) -> FrozenBase:
        """From plain values of a file that may not be trusted.

        Raises:
            ValueError: they do not describe a base.
        """
        try:
            base = cls(**{name: values[name] for name in cls.__dataclass_fields__})
            how = Storage(**base.storage)
            sound = (
                how.kind in KINDS and how.block_size in BLOCK_SIZES and how.compute_dtype in COMPUTE_DTYPES
            )
            texts = (*base.modules, *base.narrowed, base.fingerprint, base.origin)
            sound = sound and all(isinstance(text, str) for text in texts)
            sound = sound and isinstance(base.source, str | None)
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise ValueError(f"{where} does not say what its frozen weights are; give another checkpoint.")
        return base

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @property
    def name(self) -> str:
        """For messages."""
        return self.source or "weights of no checkpoint (drawn, or composed)"

    def check(self, rounded: FrozenBase, where: object) -> None:
        """That a resumed run has the very bytes that the run before it had.

        Raises:
            ValueError: it has not.
        """
        if rounded.origin != self.origin:
            raise ValueError(self._changed(where))
        if rounded.fingerprint != self.fingerprint:
            raise ValueError(
                f"{where} was trained on {self.name} as another machine or version of bitsandbytes rounds it; go on "
                "where it began, or give it as model.init_checkpoint of a new run."
            )

    def _changed(self, where: object) -> str:
        return f"{where} was trained on {self.name}, whose weights are not what they were; restore them."

    def require_source(self, where: object) -> str:
        """The checkpoint that the weights come from.

        Raises:
            ValueError: there is none.
        """
        if self.source is None:
            raise ValueError(
                f"{where} holds what trained beside quantised weights of no checkpoint (drawn, or composed), and not "
                "those; give the run directory, whose exported model is whole."
            )
        return self.source

    def complete(self, model: nn.Module, weights: dict[str, Tensor], where: object) -> dict[str, Tensor]:
        """The state dict of the trained model: ``weights``, which a checkpoint holds, with the frozen ones as training
        computed with them, in the place of base layers where adapters stand beside them.

        Args:
            model: the base in float32, which is changed.

        Raises:
            ValueError: the base is not what it was.
        """
        self.round(model, weights, where)
        frozen = {name: value for name, value in model.state_dict().items() if name not in weights}
        return {**beside_adapters(frozen, weights), **weights}

    def round(self, model: nn.Module, trained: Iterable[str], where: object) -> None:
        """Round a float32 ``model`` to what training computed with, in place.

        Args:
            trained: names of its weights that are not frozen.
            where: the checkpoint, for messages.

        Raises:
            ValueError: the model is not the one that was trained on.
        """
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if not {*self.modules, *self.narrowed} <= linear:
            raise ValueError(self._changed(where))
        quantize_layers(model, self.modules, Storage(**self.storage))
        for name in self.narrowed:
            model.get_submodule(name).to(torch.bfloat16)
        layers, known = quantized_layers(model), set(trained)
        frozen = {name: value for name, value in model.state_dict().items() if name not in known}
        if fingerprint(frozen, {name: layer.origin for name, layer in layers.items()}) != self.origin:
            raise ValueError(self._changed(where))
        for name, layer in layers.items():
            parent, _, leaf = name.rpartition(".")
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(layer.dequantized()), layer.bias  # type: ignore[assignment]
            setattr(model.get_submodule(parent), leaf, linear)


def base_names(model: nn.Module) -> set[str]:
    """The names in ``model.state_dict()`` of what does not train."""
    return {
        name
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, nn.Parameter) and not value.requires_grad
    }


def fingerprint(tensors: Mapping[str, Tensor], origins: Mapping[str, str] | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes, whether or not adapters stand beside the layers.

    Args:
        origins: layers by name, of which these digests count and not how they are stored.
    """
    origins = origins or {}
    lines = [f"{name} {origin}" for name, origin in origins.items()]
    for name, value in tensors.items():
        module, _, part = _plain(name).rpartition(".")
        if module not in origins or part not in PARTS:
            lines.append(f"{_plain(name)} {value.dtype} {list(value.shape)} {digest(value)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_quantization(folder: Path) -> FrozenBase | None:
    """The base that adapters in a folder were trained on, where it was quantised.

    Raises:
        ValueError: the file cannot be read.
    """
    path = folder / QUANTIZATION
    return FrozenBase.from_dict(read_settings(path).get("base"), path) if path.exists() else None


def quantization_file(base: FrozenBase, model: nn.Module) -> str:
    """The content of :data:`QUANTIZATION`: the base, and how Transformers is told to store it so."""
    kept = [
        _plain(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]
    theirs: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if base.storage["kind"] == "nf4":
        compute = base.storage["compute_dtype"]
        theirs = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": base.storage["double_quant"],
            "bnb_4bit_compute_dtype": "bfloat16" if compute == "auto" else compute,
        }
    theirs["llm_int8_skip_modules"] = ["lm_head", *kept]
    return json.dumps({"base": base.to_dict(), "transformers": theirs}, indent=1) + "\n"


def _plain(name: str) -> str:
    """A name as it is without adapters."""
    return f"{name}.".replace(_BASE, ".")[:-1]


def lasting(source: str) -> str:
    """A checkpoint's name that holds in other working directories: of a folder its whole path."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
