"""Augmentation of whole batches on their device, every draw owned by its sample.

The random resized crop happens where the JPEG is decoded (see ``decode``): only there is the whole picture
known. Flip, RandAugment, colour jitter and random erasing follow here, on the batch, with kornia.

All draws are hashes of (run seed, global position of the sample, what they are for). A sample looks the same
whichever rank, worker or micro-batch it falls into, and in a resumed run.

RandAugment is the policy that DeiT and GroupViT train with (timm's ``rand-m9-mstd0.5-inc1``): two of fifteen
operations a sample, each applied with probability one half, magnitude drawn around 9 of 10, all of them
growing with magnitude. It departs from timm in arithmetic (float instead of 8-bit, bilinear warps). As in
timm, colour jitter is used only where RandAugment is off.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.normalization import IMAGENET_MEAN
from .order import mix, mix_array

_MAX_LEVEL = 10.0


@dataclass
class AugmentConfig:
    """Strength of training augmentation; the defaults are the published GroupViT recipe.

    Attributes:
        crop_scale, crop_ratio: area share and aspect (width / height) of the random resized crop.
        flip: probability of a horizontal flip.
        randaugment_ops: operations a sample (0 switches RandAugment off).
        randaugment_magnitude, randaugment_std: mean and spread of the magnitude, of 10.
        color_jitter: brightness, contrast and saturation vary by 1 ± this; used where RandAugment is off.
        erase: probability of replacing a rectangle by noise.
        extra: names to ``_target_`` nodes of operations of your own, after the others and before ``erase``.
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    flip: float = 0.5
    randaugment_ops: int = 2
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    color_jitter: float = 0.4
    erase: float = 0.25
    extra: dict[str, Any] = field(default_factory=dict)


def uniforms(seed: int, positions: np.ndarray, site: str, *shape: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [n, *shape], hashed from (seed, site, position, place in shape)."""
    key = mix(seed, zlib.crc32(site.encode()))
    keys = mix_array(key, np.asarray(positions, dtype=np.int64))
    columns = mix_array(key ^ 0xA5A5, np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64))
    bits = mix_array(key ^ 0x5A5A, keys[:, None] ^ columns)
    return ((bits >> np.uint64(11)).astype(np.float64) / (1 << 53)).reshape(len(positions), *shape)


def augment(pixels: Tensor, positions: np.ndarray, seed: int, config: AugmentConfig) -> Tensor:
    """Flip, then RandAugment or colour jitter.

    Args:
        pixels: float [B, 3, H, W] in [0, 1].
        positions: global position int64 [B] of each sample.
        seed: of the run.

    Returns:
        float [B, 3, H, W] in [0, 1].
    """
    flips = torch.from_numpy(uniforms(seed, positions, "flip")[:] < config.flip).to(pixels.device)
    pixels = torch.where(flips[:, None, None, None], pixels.flip(-1), pixels)
    if config.randaugment_ops:
        return _randaugment(pixels, positions, seed, config)
    if config.color_jitter:
        return _color_jitter(pixels, positions, seed, config.color_jitter)
    return pixels


def _randaugment(pixels: Tensor, positions: np.ndarray, seed: int, config: AugmentConfig) -> Tensor:
    count, rounds = len(positions), config.randaugment_ops
    draws = uniforms(seed, positions, "randaugment", rounds, 5)
    radius = np.sqrt(-2 * np.log1p(-draws[..., 2]))  # Box-Muller
    normal = radius * np.cos(2 * np.pi * draws[..., 3])
    levels = np.clip(config.randaugment_magnitude + config.randaugment_std * normal, 0, _MAX_LEVEL)
    names = list(_OPERATIONS)
    chosen = np.minimum((draws[..., 0] * len(names)).astype(int), len(names) - 1)
    chosen[draws[..., 1] >= 0.5] = -1
    signs = np.where(draws[..., 4] < 0.5, -1.0, 1.0)
    pixels = pixels.clone()
    for turn in range(rounds):
        for number in np.unique(chosen[:, turn]):
            if number < 0:
                continue
            rows = np.flatnonzero(chosen[:, turn] == number)
            amount = torch.from_numpy(levels[rows, turn] / _MAX_LEVEL).to(pixels)
            sign = torch.from_numpy(signs[rows, turn]).to(pixels)
            index = torch.from_numpy(rows).to(pixels.device) if len(rows) < count else slice(None)
            pixels[index] = _OPERATIONS[names[number]](pixels[index], amount, sign).clamp(0, 1)
    return pixels


def _warp(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Warp by [b, 2, 3] matrices (source to target pixels); what comes into view is the mean colour."""
    from kornia.geometry import warp_affine

    fill = pixels.new_tensor(IMAGENET_MEAN)[:, None, None]
    height, width = pixels.shape[-2:]
    return warp_affine(pixels - fill, matrix, (height, width), align_corners=True) + fill


def _affine(amount: Tensor, **entries: Tensor) -> Tensor:
    matrix = amount.new_zeros(len(amount), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    for name, value in entries.items():
        matrix[:, int(name[1]), int(name[2])] = value
    return matrix


def _rotate(pixels: Tensor, amount: Tensor, sign: Tensor) -> Tensor:
    from kornia.geometry import get_rotation_matrix2d

    height, width = pixels.shape[-2:]
    centre = pixels.new_tensor([(width - 1) / 2, (height - 1) / 2]).expand(len(pixels), 2)
    matrix = get_rotation_matrix2d(centre, 30 * amount * sign, pixels.new_ones(len(pixels), 2))
    return _warp(pixels, matrix)


def _enhanced(amount: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * amount * sign).clamp(min=0.1)


def _kornia(name: str) -> Callable[..., Tensor]:
    import kornia.enhance

    return getattr(kornia.enhance, name)


def _autocontrast(pixels: Tensor, amount: Tensor, sign: Tensor) -> Tensor:
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) / (high - low).clamp(min=1e-6), pixels)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey of each image, as Pillow does."""
    grey = _grey(pixels).mean((2, 3), keepdim=True)
    return (grey + factor[:, None, None, None] * (pixels - grey)).clamp(0, 1)


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(pixels)
    return (grey + factor[:, None, None, None] * (pixels - grey)).clamp(0, 1)


def _grey(pixels: Tensor) -> Tensor:
    weights = pixels.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (pixels * weights).sum(1, keepdim=True)


def _posterize(pixels: Tensor, amount: Tensor, sign: Tensor) -> Tensor:
    step = 2.0 ** (8 - (4 - torch.floor(4 * amount)))[:, None, None, None]
    return torch.floor((255 * pixels).round() / step) * step / 255


def _solarize_add(pixels: Tensor, amount: Tensor, sign: Tensor) -> Tensor:
    added = (pixels + (110 / 255 * amount)[:, None, None, None]).clamp(max=1)
    return torch.where(pixels < 128 / 255, added, pixels)


def _solarize(pixels: Tensor, amount: Tensor, sign: Tensor) -> Tensor:
    return torch.where(pixels < (1 - amount)[:, None, None, None], pixels, 1 - pixels)


# name -> operation(pixels [b, 3, H, W], amount [b] in [0, 1], sign [b] of -1 and 1)
_OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": lambda x, a, s: _kornia("equalize")(x),
    "invert": lambda x, a, s: 1 - x,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": lambda x, a, s: _saturation(x, _enhanced(a, s)),
    "contrast": lambda x, a, s: _contrast(x, _enhanced(a, s)),
    "brightness": lambda x, a, s: _kornia("adjust_brightness_accumulative")(x, _enhanced(a, s)),
    "sharpness": lambda x, a, s: _kornia("sharpness")(x, _enhanced(a, s)),
    "shear_x": lambda x, a, s: _warp(x, _affine(a, m01=0.3 * a * s)),
    "shear_y": lambda x, a, s: _warp(x, _affine(a, m10=0.3 * a * s)),
    "translate_x": lambda x, a, s: _warp(x, _affine(a, m02=0.45 * x.shape[-1] * a * s)),
    "translate_y": lambda x, a, s: _warp(x, _affine(a, m12=0.45 * x.shape[-2] * a * s)),
}


def _color_jitter(pixels: Tensor, positions: np.ndarray, seed: int, strength: float) -> Tensor:
    draws = torch.from_numpy(uniforms(seed, positions, "jitter", 3)).to(pixels)
    factors = (1 + strength * (2 * draws - 1)).clamp(min=0)
    pixels = _kornia("adjust_brightness_accumulative")(pixels, factors[:, 0])
    return _saturation(_contrast(pixels, factors[:, 1]), factors[:, 2])


def erase(pixels: Tensor, positions: np.ndarray, seed: int, probability: float) -> Tensor:
    """Random erasing (Zhong et al. 2020): a rectangle of 2 % to a third of the area becomes normal noise.

    Args:
        pixels: normalised float [B, 3, H, W]; changed in place.
        positions: global position int64 [B] of each sample.
    """
    height, width = pixels.shape[-2:]
    draws = uniforms(seed, positions, "erase", 5)
    for row in np.flatnonzero(draws[:, 0] < probability):
        area = height * width * (0.02 + draws[row, 1] * (1 / 3 - 0.02))
        aspect = np.exp((2 * draws[row, 2] - 1) * np.log(1 / 0.3))
        rows = min(height, max(1, round(np.sqrt(area * aspect))))
        columns = min(width, max(1, round(np.sqrt(area / aspect))))
        top, left = int(draws[row, 3] * (height - rows + 1)), int(draws[row, 4] * (width - columns + 1))
        # Always on the CPU: another device's generator would draw other numbers.
        source = torch.Generator().manual_seed(mix(seed, 0xE2A5E, int(positions[row])) >> 1)
        noise = torch.randn(3, rows, columns, generator=source)
        pixels[row, :, top : top + rows, left : left + columns] = noise.to(pixels)
    return pixels


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] of any layout as contiguous float32 in [0, 1]."""
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    return out.copy_(pixels).div_(255)


def normalise(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    """Pixels to zero mean and unit spread.

    Args:
        pixels: uint8, or float in [0, 1], [B, 3, H, W] of any layout.
        mean, std: three numbers each.

    Returns:
        contiguous float32 [B, 3, H, W].
    """
    # One allocation and in place from there: on a CPU fresh pages cost more than the arithmetic.
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device).copy_(pixels)
    if pixels.dtype == torch.uint8:
        out.div_(255)
    mean, std = (out.new_tensor(values)[:, None, None] for values in (mean, std))
    return out.sub_(mean).div_(std)
