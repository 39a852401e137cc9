"""Six textured backdrops of the demo scenes, drawn with numpy.

A backdrop is a base colour, a field of smooth noise that makes it uneven, and the marks that make it
recognisable: blades, ripples, bricks. Colour and marks vary with the random generator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]


def _noise(rng: np.random.Generator, size: int, cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise in [-1, 1], [size, size]: a random grid of `cells` (rows, columns), interpolated."""
    grid = Image.fromarray(rng.uniform(-1.0, 1.0, cells).astype(np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _paint(base: Colour, spread: np.ndarray, strength: float, rng: np.random.Generator) -> Image.Image:
    """The base colour, jittered as a whole, brightened and darkened along `spread` [size, size]."""
    colour = np.asarray(base) + rng.uniform(-14.0, 14.0, 3)
    return Image.fromarray(np.clip(colour + strength * spread[..., None], 0, 255).astype(np.uint8))


def _grass(rng: np.random.Generator, size: int) -> Image.Image:
    image = _paint((150, 196, 92), _noise(rng, size, (5, 5)) + 0.6 * _noise(rng, size, (14, 48)), 16.0, rng)
    draw = ImageDraw.Draw(image)
    for x, y, lean in rng.uniform(0.0, 1.0, (70, 3)):
        x, y = x * size, y * size
        top = (x + (lean - 0.5) * 0.05 * size, y - 0.06 * size)
        draw.line(
            [(x, y), top], fill=(118, 168, 70) if lean < 0.6 else (176, 214, 116), width=max(1, size // 90)
        )
    return image


def _sand(rng: np.random.Generator, size: int) -> Image.Image:
    grain = rng.uniform(-1.0, 1.0, (size, size))
    return _paint((226, 204, 160), _noise(rng, size, (16, 4)) + 0.6 * grain, 13.0, rng)


def _sea(rng: np.random.Generator, size: int) -> Image.Image:
    image = _paint((104, 176, 206), _noise(rng, size, (7, 4)), 14.0, rng)
    draw = ImageDraw.Draw(image)
    for x, y, span in rng.uniform(0.0, 1.0, (26, 3)):
        x, y, span = x * size, y * size, (0.06 + 0.1 * span) * size
        draw.arc(
            [x - span, y, x + span, y + span * 0.7], 200, 340, fill=(176, 222, 236), width=max(1, size // 80)
        )
    return image


def _snow(rng: np.random.Generator, size: int) -> Image.Image:
    image = _paint((222, 230, 242), _noise(rng, size, (4, 3)), 12.0, rng)
    draw = ImageDraw.Draw(image)
    for x, y, span in rng.uniform(0.0, 1.0, (50, 3)):
        x, y, r = x * size, y * size, (0.006 + 0.010 * span) * size
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(250, 252, 255) if span < 0.6 else (190, 204, 226))
    return image


def _bricks(rng: np.random.Generator, size: int) -> Image.Image:
    image = _paint((186, 178, 174), _noise(rng, size, (6, 6)), 8.0, rng)
    draw = ImageDraw.Draw(image)
    base = np.asarray((164, 112, 98)) + rng.uniform(-10.0, 10.0, 3)
    rows = int(rng.integers(7, 10))
    height = size / rows
    gap = max(1.0, 0.10 * height)
    for row in range(rows):
        for column in range(-1, rows // 2 + 1):
            x, y = (column + (row % 2) / 2) * 2 * height, row * height
            tone = tuple(int(c) for c in np.clip(base + rng.uniform(-16.0, 16.0), 0, 255))
            draw.rectangle([x + gap, y + gap, x + 2 * height - gap, y + height - gap], fill=tone)
    return image


def _night(rng: np.random.Generator, size: int) -> Image.Image:
    image = _paint((38, 42, 78), _noise(rng, size, (4, 4)), 12.0, rng)
    draw = ImageDraw.Draw(image)
    for x, y, glow in rng.uniform(0.0, 1.0, (40, 3)):
        x, y, r = x * size, y * size, (0.003 + 0.006 * glow) * size
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(190, 196, 226))
    return image


_BACKDROPS: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "grass": _grass,
    "sand": _sand,
    "sea": _sea,
    "snow": _snow,
    "bricks": _bricks,
    "night": _night,
}

BACKDROP_NAMES: tuple[str, ...] = tuple(_BACKDROPS)


def draw_backdrop(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """The named backdrop as an RGB image [size, size]."""
    return _BACKDROPS[name](rng, size)
