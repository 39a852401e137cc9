"""A picture of predictions: scenes, their predicted segments with labels, and the truth, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...files import open_atomically

# Far apart in hue and lightness; the background keeps the picture, greyed.
_PALETTE: tuple[tuple[int, int, int], ...] = (
    (214, 39, 40),
    (27, 128, 62),
    (222, 184, 120),
    (31, 102, 190),
    (255, 127, 14),
    (120, 200, 235),
    (236, 100, 190),
    (240, 210, 40),
    (140, 86, 60),
    (130, 70, 190),
    (80, 190, 150),
    (110, 110, 30),
    (170, 20, 110),
    (20, 60, 90),
    (160, 220, 80),
    (90, 90, 100),
)
_PANEL = 168  # pixels a side
_GAP = 6
_PAPER = (250, 250, 248)
_INK = (30, 32, 38)


def colour_of(class_id: int) -> tuple[int, int, int]:
    """The colour a class has on every sheet; ids count from 1."""
    return _PALETTE[(class_id - 1) % len(_PALETTE)]


def draw_contact_sheet(
    images: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    names: Sequence[str],
    path: Path,
    *,
    title: str,
    columns: int = 3,
) -> None:
    """Write the sheet as a PNG.

    Args:
        images: uint8 RGB [H, W, 3] each.
        predictions, truths: class ids [H, W] each, 0 for the background.
        names: of the classes 1, 2, …
        path: where to.
        title: one line above.
        columns: scenes side by side; each takes three panels.
    """
    rows = -(-len(images) // columns)
    scene_width = 3 * _PANEL + 4 * _GAP
    width = columns * scene_width + _GAP
    top, legend_height = 62, _legend_height(names, width)
    height = top + rows * (_PANEL + 2 * _GAP) + legend_height + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, 10), title, fill=_INK, font=_font(18))
    for column in range(columns):
        for panel, heading in enumerate(("scene", "predicted segments", "truth")):
            x = _GAP + column * scene_width + panel * (_PANEL + _GAP)
            draw.text((x + _GAP, 40), heading, fill=(110, 112, 120), font=_font(13))
    for i, (image, prediction, truth) in enumerate(zip(images, predictions, truths, strict=True)):
        x = 2 * _GAP + (i % columns) * scene_width
        y = top + (i // columns) * (_PANEL + 2 * _GAP)
        picture = Image.fromarray(image).resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)
        panels = (picture, _overlay(picture, prediction, names), _overlay(picture, truth, names))
        for panel, content in enumerate(panels):
            sheet.paste(content, (x + panel * (_PANEL + _GAP), y))
    _draw_legend(draw, names, top + rows * (_PANEL + 2 * _GAP) + _GAP, width)
    with open_atomically(path) as file:
        sheet.save(file, format="PNG")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _overlay(picture: Image.Image, ids: np.ndarray, names: Sequence[str]) -> Image.Image:
    """The greyed picture under its segments, each named in its middle."""
    large = np.asarray(Image.fromarray(ids.astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST))
    grey = np.asarray(picture.convert("L"), np.float32)[..., None].repeat(3, axis=-1)
    painted = 0.55 * grey + 0.45 * 255.0
    present = [int(c) for c in np.unique(large) if c > 0]
    for class_id in present:
        inside = large == class_id
        painted[inside] = 0.25 * grey[inside] + 0.75 * np.asarray(colour_of(class_id), np.float32)
    panel = Image.fromarray(painted.astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    font = _font(12)
    for class_id in present:
        where = np.argwhere(large == class_id)
        if len(where) < 0.012 * large.size:
            continue
        middle_y, middle_x = np.median(where, axis=0)
        left, top, right, bottom = draw.textbbox((0, 0), names[class_id - 1], font=font)
        half_width, half_height = (right - left) / 2, (bottom - top) / 2
        x = float(np.clip(middle_x - half_width, 3, panel.width - 2 * half_width - 3))
        y = float(np.clip(middle_y - half_height - top, 1, panel.height - 2 * half_height - top - 3))
        box = [x - 2, y + top - 2, x + 2 * half_width + 2, y + bottom + 2]
        draw.rectangle(box, fill=(255, 255, 255))
        draw.text((x, y), names[class_id - 1], fill=_INK, font=font)
    return panel


def _legend_places(names: Sequence[str], width: int) -> list[tuple[int, int]]:
    """Where the entries go, line by line, from (0, 0)."""
    places, x, y = [], 2 * _GAP, 0
    for name in names:
        room = 34 + int(_font(14).getlength(name))
        if x + room > width:
            x, y = 2 * _GAP, y + 24
        places.append((x, y))
        x += room
    return places


def _legend_height(names: Sequence[str], width: int) -> int:
    return 30 + max((y for _, y in _legend_places(names, width)), default=0)


def _draw_legend(draw: ImageDraw.ImageDraw, names: Sequence[str], top: int, width: int) -> None:
    for i, (x, y) in enumerate(_legend_places(names, width)):
        draw.rectangle([x, top + y + 2, x + 14, top + y + 16], fill=colour_of(i + 1))
        draw.text((x + 19, top + y), names[i], fill=_INK, font=_font(14))
