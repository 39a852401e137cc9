"""Input checks of both towers, and what noise a forward pass uses.

Shapes are always checked. Looking at values costs a synchronisation on a GPU, so there it is left out of
training; a compiled model does not look at values at all.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..noise import Noise
from .configuration import GroupViTTextConfig, GroupViTVisionConfig


def active_noise(module: nn.Module, noise: Noise | None) -> Noise | None:
    """None in evaluation mode; in training the given source, or one drawn from torch's default generator."""
    if not module.training:
        return None
    return Noise.draw() if noise is None else noise


def looks_at_values(module: nn.Module, tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or not module.training


def check_pixels(module: nn.Module, pixel_values: Tensor, config: GroupViTVisionConfig) -> None:
    """Raise ValueError unless ``pixel_values`` is [B, channels, H, W], divisible by the patch, finite."""
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4:
        found = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise ValueError(f"pixel_values is {found}; expected a tensor [batch, channels, height, width].")
    _, channels, height, width = pixel_values.shape
    if channels != config.num_channels:
        raise ValueError(
            f"pixel_values has {channels} channels but the model takes {config.num_channels}; "
            "convert the images (RGB has 3) and put channels second."
        )
    patch_height, patch_width = config.patch_hw
    if height % patch_height or width % patch_width or not height or not width:
        raise ValueError(
            f"pixel_values is {height}x{width} pixels, which is not divisible by the patch size "
            f"{patch_height}x{patch_width}; resize or pad the images."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values has type {pixel_values.dtype}; expected normalised floating-point pixels, as "
            "GroupViTProcessor makes them."
        )
    if looks_at_values(module, pixel_values):
        finite = torch.isfinite(pixel_values).flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"pixel_values of image {row} in the batch holds NaN or infinite values; "
                "check how it was decoded."
            )


def check_text(
    module: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    config: GroupViTTextConfig,
) -> None:
    """Raise ValueError unless the token ids [B, T] and what goes with them fit the model."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        found = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is {found}; expected a tensor [batch, tokens].")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids has type {input_ids.dtype}; expected integer token ids.")
    batch, length = input_ids.shape
    if length > config.max_position_embeddings or length == 0:
        raise ValueError(
            f"input_ids has {length} tokens a caption but the model takes 1 to "
            f"{config.max_position_embeddings}; truncate them (truncation=True in the processor)."
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} but input_ids is {[batch, length]}; "
            "they must have the same shape."
        )
    if position_ids is not None and tuple(position_ids.shape) not in {(batch, length), (1, length)}:
        raise ValueError(
            f"position_ids is {list(position_ids.shape)} but input_ids is {[batch, length]}; "
            f"expected {[batch, length]} or {[1, length]}."
        )
    if not looks_at_values(module, input_ids):
        return
    low, high = (int(v) for v in input_ids.aminmax()) if batch else (0, 0)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"input_ids holds {low if low < 0 else high}, outside the vocabulary 0..{config.vocab_size - 1}; "
            "use the tokenizer that belongs to this checkpoint."
        )
    if position_ids is not None and position_ids.numel():
        low, high = (int(v) for v in position_ids.aminmax())
        if low < 0 or high >= config.max_position_embeddings:
            raise ValueError(
                f"position_ids holds {low if low < 0 else high}, outside "
                f"0..{config.max_position_embeddings - 1}; positions count from 0."
            )
    if config.eos_token_id != 2:
        ended = (input_ids == config.eos_token_id).any(1)
        if not bool(ended.all()):
            warnings.warn(
                f"Captions without an end token (id {config.eos_token_id}), where a caption is pooled, are pooled at "
                "their first token; end every caption with it, after truncation too.",
                stacklevel=2,
            )
