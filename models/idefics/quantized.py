"""Linear layers whose frozen weight is kept in four or eight bits (QLoRA; Dettmers et al., 2023), by ``bitsandbytes``.

- ``nf4``: blocks of weights, taken along the rows end to end, each divided by its largest magnitude and rounded to the
  nearest of sixteen quantiles of the normal distribution; two in a byte. With double quantisation the magnitudes
  themselves take a byte each.
- ``int8``: rows divided by their largest magnitude, in steps of 1/127.

The stored numbers are those that Transformers stores. A product is one with the weight as it is dequantised, forward
and backward, made anew each time; activations are never rounded. What is stored are plain frozen parameters, so that
they are moved, sharded and counted as any others: matrices are columns of bytes, floating-point scales are vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import _BASE
from .layers import product_dtype

KINDS = ("nf4", "int8")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Magnitudes that share a scale in double quantisation, as bitsandbytes has it.
NESTED_BLOCK = 256
PARTS = ("weight", "absmax", "nested_absmax", "offset", "scale")


@dataclass(frozen=True)
class Storage:
    """How frozen matrices are stored.

    Attributes:
        kind: one of :data:`KINDS`.
        block_size: weights that share a scale, of nf4.
        double_quant: whether the scales of nf4 take a byte each instead of four.
        compute_dtype: of the products: ``auto`` is that of the layers around, autocast's where it is on.
    """

    kind: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: str = "auto"


class QuantizedLinear(nn.Module):
    """x [..., in] -> [..., out] with a stored weight that does not train; gradients reach ``x`` alone.

    Attributes:
        weight: uint8 [ceil(out * in / 2), 1] of nf4, int8 [out, in] of int8.
        absmax: of nf4: uint8 [blocks, 1], or float32 [blocks] without double quantisation.
        nested_absmax, offset: float32 [ceil(blocks / 256)] and [1], of double quantisation.
        scale: float32 [out], of int8.
        bias: [out] as it was, or None.
        origin: SHA-256 of the weight before it was stored, in float32; empty on ``meta``.
    """

    bias: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], storage: Storage, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.storage = storage
        self.origin = ""
        self.bias = None
        for name, tensor in parts.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        outside = product_dtype(x)
        inside = (
            outside if self.storage.compute_dtype == "auto" else getattr(torch, self.storage.compute_dtype)
        )
        return _Product.apply(x, self, inside).to(outside)  # type: ignore[union-attr]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in] that the layer computes with."""
        parts = {name: value for name in PARTS if (value := getattr(self, name, None)) is not None}
        return dequantize(parts, (self.out_features, self.in_features), self.storage, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.storage.kind}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W^T + b whose backward pass dequantises W again: nothing of its size is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        # Not the tensors: a sharded layer's are gathered anew for its backward pass.
        ctx.layer, ctx.dtypes = layer, (dtype, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(dtype)
            return F.linear(x.to(dtype), layer.dequantized(dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        dtype, outside = ctx.dtypes
        with torch.autocast(gradients[0].device.type, enabled=False):
            return (gradients[0].to(dtype) @ ctx.layer.dequantized(dtype)).to(outside), None, None


def library() -> Any:
    """The functions of ``bitsandbytes``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        raise ValueError(
            "weights in 4 or 8 bits (model.quantize) need the package bitsandbytes; install interloom[qlora]."
        ) from None
    return functional


def quantize(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    """The stored parts of a weight [out, in]; on ``meta`` only their shapes, which needs no library."""
    if weight.is_meta:
        return _shapes(weight, storage)
    functional = library()
    # A GPU does in a second what takes a core half an hour, for nine billion weights.
    place = torch.accelerator.current_accelerator(check_available=True) or weight.device
    values = weight.detach().to(place)
    if storage.kind == "int8":
        whole, scale, _ = functional.int8_vectorwise_quant(values.half())
        parts = {"weight": whole, "scale": scale}
    else:
        packed, state = functional.quantize_4bit(
            values.float().contiguous(),
            blocksize=storage.block_size,
            compress_statistics=storage.double_quant,
            quant_type="nf4",
        )
        parts = {"weight": packed.view(-1, 1)}
        if storage.double_quant:
            parts["absmax"] = state.absmax.view(-1, 1)
            parts["nested_absmax"], parts["offset"] = state.state2.absmax, state.offset.view(1)
        else:
            parts["absmax"] = state.absmax
    return {name: value.to(weight.device) for name, value in parts.items()}


def _shapes(weight: Tensor, storage: Storage) -> dict[str, Tensor]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if storage.kind == "int8":
        return {
            "weight": empty(*weight.shape, dtype=torch.int8),
            "scale": empty(weight.shape[0], dtype=torch.float32),
        }
    blocks = -(-weight.numel() // storage.block_size)
    packed = empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    if not storage.double_quant:
        return {"weight": packed, "absmax": empty(blocks)}
    return {
        "weight": packed,
        "absmax": empty(blocks, 1, dtype=torch.uint8),
        "nested_absmax": empty(-(-blocks // NESTED_BLOCK)),
        "offset": empty(1),
    }


def dequantize(
    parts: Mapping[str, Tensor], shape: tuple[int, int], storage: Storage, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [out, in] that stored ``parts`` stand for."""
    functional = library()
    weight = parts["weight"]
    if storage.kind == "int8":
        return functional.int8_vectorwise_dequant(weight, parts["scale"]).to(dtype)
    codes, nested_codes = _codes(weight.device)
    nested = None
    if storage.double_quant:
        nested = functional.QuantState(
            absmax=parts["nested_absmax"], code=nested_codes, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=parts["absmax"].view(-1),
        shape=torch.Size(shape),
        code=codes,
        blocksize=storage.block_size,
        quant_type="nf4",
        dtype=dtype,
        offset=parts["offset"][0] if storage.double_quant else None,
        state2=nested,
    )
    return functional.dequantize_4bit(weight, state)


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The sixteen values of nf4 and the 256 of its scales, the same for every matrix."""
    functional = library()
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers of a model that are stored so, by the names they have in released checkpoints."""
    return {
        f"{name}.".replace(_BASE, ".")[:-1]: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def quantize_layers(model: nn.Module, names: Iterable[str], storage: Storage) -> None:
    """Replace linear layers, adapted or not, by stored ones.

    Args:
        names: as ``model.named_modules()`` has them.

    Raises:
        ValueError: a matrix is too narrow, or the library is not there.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if storage.kind == "nf4" and linear.in_features < storage.block_size:
            shown = f"{name}.".replace(_BASE, ".")[:-1]
            raise ValueError(
                f"model.quantize=nf4 cannot store {shown}, whose rows of {linear.in_features} are narrower than "
                f"model.quantization.block_size={storage.block_size}; add {shown.rpartition('.')[2]} to "
                "model.quantization.skip, or take a smaller block."
            )
        stored = QuantizedLinear(
            (linear.out_features, linear.in_features), storage, quantize(linear.weight, storage)
        )
        if linear.bias is not None:
            stored.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        if not linear.weight.is_meta:
            stored.origin = digest(linear.weight.detach().float())
        setattr(model.get_submodule(parent), leaf, stored.train(linear.training))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()


def plain_weight(
    weights: dict[str, Tensor], prefix: str, layer: QuantizedLinear, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [out, in] of the layer whose stored parts are in ``weights`` under ``prefix``; they are taken out."""
    parts = {part: weights.pop(key) for part in PARTS if (key := f"{prefix}{part}") in weights}
    return dequantize(parts, (layer.out_features, layer.in_features), layer.storage, dtype)
