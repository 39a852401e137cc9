"""A picture with its segments in colour and a legend below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...files import open_atomically
from .contact_sheet import colour_of

_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def draw_overlay(
    image: np.ndarray, mask: np.ndarray, names: Sequence[str], path: Path, *, opacity: float = 0.55
) -> None:
    """Write ``image`` with its segments over it.

    Args:
        image: uint8 RGB [H, W, 3].
        mask: class ids [H, W], 0 for the background, which stays uncoloured.
        names: of the classes 1, 2, …; the legend shows those in the mask.
        path: of the picture; replaced in one step.
        opacity: of the colours, 0 to 1.
    """
    colours = np.array([(0, 0, 0), *(colour_of(i + 1) for i in range(len(names)))], dtype=np.float32)
    weight = np.where(mask > 0, opacity, 0.0)[..., None].astype(np.float32)
    blended = image * (1 - weight) + colours[mask] * weight
    edges = np.zeros(mask.shape, dtype=bool)
    edges[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edges[1:] |= mask[1:] != mask[:-1]
    blended[edges] = 255
    picture = Image.fromarray(blended.round().astype(np.uint8))

    # Tiny images are enlarged so that the legend can be read.
    factor = max(1, round(320 / max(picture.size)))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    entries = [(name, colour_of(i + 1)) for i, name in enumerate(names) if (mask == i + 1).any()]
    legend = _legend(entries or [("background", _PAPER)], max(picture.width, 200))
    sheet = Image.new("RGB", (max(picture.width, legend.width), picture.height + legend.height), _PAPER)
    sheet.paste(picture, (0, 0))
    sheet.paste(legend, (0, picture.height))
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path} has no ending of a picture; give one such as .png or .jpg.")
    with open_atomically(path) as file:
        sheet.save(file, format=kind)


def _legend(entries: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Image.Image:
    """Coloured squares with names, in as many lines as ``width`` needs."""
    size = 16
    font = ImageFont.load_default(size)
    places: list[tuple[int, int]] = []
    left, line = 8, 0
    for name, _ in entries:
        wide = size + 6 + int(font.getlength(name)) + 16
        if left > 8 and left + wide > width:
            left, line = 8, line + 1
        places.append((left, line))
        left += wide
    height = (line + 1) * (size + 10) + 8
    needed = max(
        x + size + 6 + int(font.getlength(name)) + 8
        for (x, _), (name, _) in zip(places, entries, strict=True)
    )
    legend = Image.new("RGB", (max(width, needed), height), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (x, row), (name, colour) in zip(places, entries, strict=True):
        y = 8 + row * (size + 10)
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline=_INK)
        draw.text((x + size + 6, y + size // 2), name, fill=_INK, font=font, anchor="lm")
    return legend
