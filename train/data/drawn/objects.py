"""Ten kinds of drawn object: the foreground of the demo scenes.

Every kind keeps the look that makes it recognisable (an apple has a stem, a car two wheels) while colour,
proportions and pose vary with the random generator. A drawer works in object coordinates: the unit square
[-1, 1]^2, x to the right, y down; `Pen` carries rotation, mirroring and scale, so the drawers know nothing
of them.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


class Pen:
    """Draws filled shapes of object coordinates on a transparent RGBA tile.

    Args:
        size: side of the tile in pixels; the object fills it up to a small margin.
        angle: rotation in radians, clockwise as seen.
        mirror: whether the object faces the other way.
    """

    def __init__(self, size: int, angle: float, mirror: bool) -> None:
        self.tile = Image.new("RGBA", (size, size), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.tile)
        self._half = size / 2.0
        # A rotated square needs sqrt(2) of room only at its corners, which no drawer reaches.
        self._scale = size / 2.0 * 0.92
        self._cos, self._sin = math.cos(angle), math.sin(angle)
        self._flip = -1.0 if mirror else 1.0

    def _place(self, points: Points) -> Points:
        placed = []
        for x, y in points:
            x *= self._flip
            u, v = self._cos * x - self._sin * y, self._sin * x + self._cos * y
            placed.append((self._half + self._scale * u, self._half + self._scale * v))
        return placed

    def polygon(self, points: Points, colour: Colour) -> None:
        self._draw.polygon(self._place(points), fill=(*colour, 255))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour, turn: float = 0.0) -> None:
        """Ellipse around (x, y) with half-axes rx, ry, its first axis turned by `turn` radians."""
        self.polygon(arc(x, y, rx, ry, 0.0, 2.0 * math.pi, turn), colour)


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float, turn: float = 0.0) -> Points:
    """Points on an elliptic arc from angle `start` to `stop` (radians, 0 to the right, clockwise as seen)."""
    cos, sin = math.cos(turn), math.sin(turn)
    points = []
    for t in np.linspace(start, stop, 28):
        u, v = rx * math.cos(t), ry * math.sin(t)
        points.append((x + cos * u - sin * v, y + sin * u + cos * v))
    return points


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1.0:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(255 - (255 - c) * (2.0 - factor)) for c in colour)  # type: ignore[return-value]


# Hue (degrees), saturation and value ranges of the named colours an object may take.
_COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((352, 366), (0.78, 0.95), (0.72, 0.92)),
    "orange": ((20, 32), (0.80, 0.98), (0.90, 1.00)),
    "yellow": ((46, 56), (0.75, 0.95), (0.93, 1.00)),
    "lime": ((76, 92), (0.60, 0.80), (0.70, 0.85)),
    "green": ((120, 145), (0.55, 0.85), (0.35, 0.55)),
    "teal": ((172, 186), (0.70, 0.95), (0.55, 0.75)),
    "blue": ((214, 230), (0.65, 0.90), (0.65, 0.95)),
    "purple": ((268, 284), (0.50, 0.75), (0.60, 0.85)),
    "pink": ((318, 336), (0.40, 0.65), (0.92, 1.00)),
    "brown": ((18, 28), (0.50, 0.70), (0.40, 0.58)),
    "white": ((200, 220), (0.00, 0.06), (0.94, 1.00)),
    "cream": ((36, 46), (0.18, 0.35), (0.92, 1.00)),
}

COLOUR_NAMES: tuple[str, ...] = tuple(_COLOURS)


def sample_colour(name: str, rng: np.random.Generator) -> Colour:
    """A shade of the named colour."""
    hue, saturation, value = (rng.uniform(*span) for span in _COLOURS[name])
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value))  # type: ignore[return-value]


def _apple(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    wide = rng.uniform(0.42, 0.50)
    pen.polygon([(-0.05, -0.45), (0.10, -0.92), (0.22, -0.88), (0.06, -0.40)], sample_colour("brown", rng))
    pen.ellipse(0.36, -0.72, 0.28, 0.13, sample_colour("lime", rng), -0.35)
    pen.ellipse(-0.38, 0.15, wide, 0.70, colour)
    pen.ellipse(0.38, 0.15, wide, 0.70, colour)
    pen.ellipse(0.0, 0.25, 0.55, 0.62, colour)
    pen.ellipse(-0.45, -0.10, 0.12, 0.24, shade(colour, 1.5), 0.3)


def _tree(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    pen.polygon([(-0.13, 0.1), (0.13, 0.1), (0.2, 0.95), (-0.2, 0.95)], sample_colour("brown", rng))
    if rng.random() < 0.5:  # a fir: three skirts
        for i, (top, bottom, half) in enumerate(
            ((-0.3, 0.55, 0.72), (-0.65, 0.1, 0.58), (-0.98, -0.35, 0.42))
        ):
            pen.polygon([(0.0, top), (half, bottom), (-half, bottom)], shade(colour, 0.82 + 0.12 * i))
    else:
        for x, y, r in ((-0.4, 0.0, 0.42), (0.4, 0.0, 0.42), (0.0, -0.45, 0.5), (0.0, 0.05, 0.45)):
            pen.ellipse(x, y, r, r, colour)
        pen.ellipse(-0.18, -0.5, 0.22, 0.2, shade(colour, 1.18))


def _house(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    roof = sample_colour("brown", rng)
    pen.polygon([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.9), (-0.72, 0.9)], colour)
    pen.polygon([(0.38, -0.85), (0.58, -0.85), (0.58, -0.3), (0.38, -0.3)], shade(roof, 0.8))
    pen.polygon([(-0.95, -0.1), (0.0, rng.uniform(-0.98, -0.8)), (0.95, -0.1)], roof)
    pen.polygon([(-0.16, 0.3), (0.2, 0.3), (0.2, 0.9), (-0.16, 0.9)], shade(roof, 0.75))
    for x in (-0.56, 0.34):
        pen.polygon([(x, 0.12), (x + 0.26, 0.12), (x + 0.26, 0.42), (x, 0.42)], (96, 150, 190))


def _car(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    top = rng.uniform(-0.62, -0.48)
    pen.polygon([(-0.58, -0.1), (-0.36, top), (0.36, top), (0.66, -0.1)], colour)
    pen.polygon([(-0.42, -0.1), (-0.27, top + 0.12), (-0.03, top + 0.12), (-0.03, -0.1)], (205, 228, 240))
    pen.polygon([(0.07, -0.1), (0.07, top + 0.12), (0.29, top + 0.12), (0.48, -0.1)], (205, 228, 240))
    pen.polygon(
        [(-0.97, 0.0), (-0.85, -0.14), (0.8, -0.14), (0.97, 0.05), (0.97, 0.42), (-0.97, 0.42)], colour
    )
    pen.polygon([(0.82, 0.05), (0.97, 0.05), (0.97, 0.18), (0.82, 0.18)], (255, 232, 140))
    for x in (-0.52, 0.52):
        pen.ellipse(x, 0.42, 0.27, 0.27, (38, 38, 44))
        pen.ellipse(x, 0.42, 0.12, 0.12, (190, 192, 198))


def _fish(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    tall = rng.uniform(0.42, 0.54)
    fin = shade(colour, 0.8)
    pen.polygon([(0.35, 0.0), (0.97, -0.5), (0.84, 0.0), (0.97, 0.5)], fin)
    pen.polygon([(-0.25, -0.35), (0.1, -0.85), (0.4, -0.2)], fin)
    pen.ellipse(-0.18, 0.0, 0.78, tall, colour)
    for x in (-0.12, 0.2):
        pen.polygon(
            [(x, -tall * 0.8), (x + 0.13, -tall * 0.75), (x + 0.13, tall * 0.75), (x, tall * 0.8)],
            (252, 246, 232),
        )
    pen.ellipse(-0.60, -0.12, 0.13, 0.13, (255, 255, 255))
    pen.ellipse(-0.62, -0.12, 0.06, 0.06, (20, 20, 24))


def _boat(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    hull = sample_colour("brown", rng)
    tip = rng.uniform(0.62, 0.8)
    pen.polygon([(-0.05, -0.95), (0.04, -0.95), (0.04, 0.45), (-0.05, 0.45)], shade(hull, 0.8))
    pen.polygon([(0.08, -0.92), (tip, 0.32), (0.08, 0.32)], colour)
    pen.polygon([(-0.1, -0.72), (-0.1, 0.32), (-0.62, 0.32)], shade(colour, 0.88))
    pen.polygon([(-0.92, 0.4), (0.92, 0.4), (0.6, 0.88), (-0.62, 0.88)], hull)
    pen.polygon([(-0.92, 0.4), (0.92, 0.4), (0.87, 0.5), (-0.87, 0.5)], shade(hull, 1.35))


def _flower(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    petals = int(rng.integers(5, 8))
    for i in range(petals):
        t = 2.0 * math.pi * i / petals
        pen.ellipse(
            0.55 * math.cos(t), 0.55 * math.sin(t), 0.40, 0.27, shade(colour, 1.0 if i % 2 else 0.92), t
        )
    pen.ellipse(0.0, 0.0, 0.30, 0.30, sample_colour("yellow", rng))
    pen.ellipse(0.0, 0.0, 0.16, 0.16, sample_colour("orange", rng))


def _star(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    inner = rng.uniform(0.42, 0.52)
    outline = []
    for i in range(10):
        r = 0.97 if i % 2 == 0 else inner
        t = math.pi * i / 5 - math.pi / 2
        outline.append((r * math.cos(t), r * math.sin(t)))
    pen.polygon(outline, colour)
    for i in range(0, 10, 2):  # one half of every ray in shade gives it a fold
        pen.polygon([outline[i], outline[(i + 1) % 10], (0.0, 0.0)], shade(colour, 0.88))


def _mushroom(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    stem = sample_colour("cream", rng)
    pen.polygon([(-0.24, 0.0), (0.24, 0.0), (0.34, 0.9), (-0.34, 0.9)], stem)
    pen.polygon([*arc(0.0, 0.15, 0.95, rng.uniform(0.85, 1.05), math.pi, 2.0 * math.pi)], colour)
    for x, y, r in ((-0.5, -0.15, 0.15), (0.05, -0.48, 0.18), (0.52, -0.12, 0.14), (0.0, 0.0, 0.10)):
        pen.ellipse(x, y, r, r * 0.85, (250, 244, 236))


def _butterfly(pen: Pen, colour: Colour, rng: np.random.Generator) -> None:
    spot = shade(colour, 1.55)
    for side in (-1.0, 1.0):
        pen.ellipse(side * 0.50, -0.34, 0.52, 0.40, colour, side * -0.6)
        pen.ellipse(side * 0.40, 0.42, 0.38, 0.34, shade(colour, 0.82), side * 0.5)
        pen.ellipse(side * 0.56, -0.40, 0.20, 0.15, spot, side * -0.6)
        pen.ellipse(side * 0.44, 0.46, 0.14, 0.12, spot)
    pen.ellipse(0.0, 0.0, 0.09, 0.66, (46, 36, 44))


@dataclass(frozen=True)
class Kind:
    """A class of object: its drawer and the colours it is seen in."""

    name: str
    draw: Callable[[Pen, Colour, np.random.Generator], None]
    colours: tuple[str, ...]


# The order is the class id minus one; 0 is the background.
KINDS: tuple[Kind, ...] = (
    Kind("apple", _apple, ("red", "lime")),
    Kind("tree", _tree, ("green",)),
    Kind("house", _house, ("cream",)),
    Kind("car", _car, ("blue", "red")),
    Kind("fish", _fish, ("orange",)),
    Kind("boat", _boat, ("white",)),
    Kind("flower", _flower, ("pink",)),
    Kind("star", _star, ("yellow",)),
    Kind("mushroom", _mushroom, ("red", "orange")),
    Kind("butterfly", _butterfly, ("purple", "teal")),
)

CLASS_NAMES: tuple[str, ...] = tuple(kind.name for kind in KINDS)


def draw_object(class_id: int, colour_name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """One object on a transparent tile.

    Args:
        class_id: 1-based index into `KINDS` (0 is the background and has no drawing).
        colour_name: one of the kind's colours.
        size: side of the tile in pixels.
        rng: decides shade, proportions, rotation (up to 17 degrees) and mirroring.

    Returns:
        RGBA image [size, size] whose alpha is the object's silhouette.
    """
    kind = KINDS[class_id - 1]
    pen = Pen(size, rng.uniform(-0.3, 0.3), bool(rng.random() < 0.5))
    kind.draw(pen, sample_colour(colour_name, rng), rng)
    return pen.tile
