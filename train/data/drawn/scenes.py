"""Drawn scenes with captions and exact masks: the demo's pictures.

Scene `index` of a seed is a pure function of the two, whatever was drawn before, so shards can be rebuilt
bit for bit and training and held-out scenes never coincide. A scene holds one to four objects of different
kinds (`drawn_objects`) on a textured backdrop (`drawn_backdrops`). Objects may overlap, later ones cover
earlier ones, but each keeps at least half of itself in sight, so every noun of the caption can be seen.

The mask serves evaluation only: nothing in training reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .backdrops import BACKDROP_NAMES, draw_backdrop
from .objects import CLASS_NAMES, KINDS, draw_object

MAX_OBJECTS = 4
# Objects are drawn at this multiple of the final resolution and reduced, which smooths their outlines.
_OVERSAMPLING = 4
_MIN_VISIBLE = 0.5

_OPENINGS = ("", "", "a photo of ", "a drawing of ", "a picture of ", "there is ", "we see ")
_SETTINGS = {"bricks": "in front of bricks", "night": "in the night", "sea": "in the sea"}

# Every word of a caption besides the names of kinds, colours and backdrops.
CAPTION_WORDS: tuple[str, ...] = (*_OPENINGS, *_SETTINGS.values(), "on", "a", "an", "and", ",")


@dataclass(frozen=True)
class Scene:
    """One drawn scene.

    Attributes:
        image: uint8 RGB [H, W, 3].
        mask: uint8 class ids [H, W]; 0 is the background, i is `CLASS_NAMES[i - 1]`.
        caption: a sentence naming every object, most with their colour, and the backdrop.
        nouns: the kinds in the order of the caption, then the backdrop.
    """

    image: np.ndarray
    mask: np.ndarray
    caption: str
    nouns: list[str]


def _generator(seed: int, index: int, attempt: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index, attempt])))


def draw_scene(seed: int, index: int, size: int = 64) -> Scene:
    """Scene `index` of `seed`, at `size` x `size` pixels.

    The same seed and index at another size give the same composition at that resolution, up to the
    finest marks of the backdrop.

    Raises:
        ValueError: if `size` is below 16 or an argument is negative.
    """
    if size < 16:
        raise ValueError(f"size is {size}; a scene needs at least 16 pixels a side to show its objects")
    if seed < 0 or index < 0:
        raise ValueError(f"seed is {seed} and index {index}; both must be 0 or more")
    attempt = 0
    while True:
        scene = _try_scene(_generator(seed, index, attempt), size)
        if scene is not None:
            return scene
        attempt += 1


def _place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]] | None:
    """Centres and half-sizes (x, y, r) in units of the image side; None if they crowd each other."""
    largest = (0.42, 0.33, 0.29, 0.26)[count - 1]
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(20):
            r = rng.uniform(0.7, 1.0) * largest
            x, y = rng.uniform(0.8 * r, 1.0 - 0.8 * r, 2)
            # Two thirds of the touching distance lets objects overlap without hiding each other.
            if all(math.hypot(x - u, y - v) > 0.68 * (r + s) for u, v, s in placed):
                placed.append((float(x), float(y), float(r)))
                break
        else:
            return None
    return placed


def _try_scene(rng: np.random.Generator, size: int) -> Scene | None:
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    class_ids = [int(i) + 1 for i in rng.choice(len(KINDS), count, replace=False)]
    colours = [str(rng.choice(KINDS[i - 1].colours)) for i in class_ids]
    backdrop = str(rng.choice(BACKDROP_NAMES))
    object_seeds = rng.integers(0, 2**63, count)
    caption, nouns = _describe(rng, class_ids, colours, backdrop)
    places = _place(rng, count)
    if places is None:
        return None

    canvas = draw_backdrop(backdrop, 2 * size, rng).reduce(2)
    mask = np.zeros((size, size), np.uint8)
    areas = []
    for class_id, colour, object_seed, (x, y, r) in zip(
        class_ids, colours, object_seeds, places, strict=True
    ):
        tile_size = max(8, round(2 * r * size))
        tile = draw_object(
            class_id, colour, tile_size * _OVERSAMPLING, np.random.default_rng(int(object_seed))
        )
        tile = tile.convert("RGBa").reduce(_OVERSAMPLING).convert("RGBA")
        layer = Image.new("L", (size, size), 0)
        corner = (round(x * size - tile_size / 2), round(y * size - tile_size / 2))
        layer.paste(tile.getchannel("A"), corner)
        canvas.paste(tile, corner, tile)
        inside = np.asarray(layer) >= 128
        areas.append(int((np.asarray(tile.getchannel("A")) >= 128).sum()))
        mask[inside] = class_id
    for class_id, area in zip(class_ids, areas, strict=True):
        if int((mask == class_id).sum()) < _MIN_VISIBLE * area:
            return None
    return Scene(np.asarray(canvas), mask, caption, nouns)


def _describe(
    rng: np.random.Generator, class_ids: list[int], colours: list[str], backdrop: str
) -> tuple[str, list[str]]:
    phrases, names = [], []
    for i in rng.permutation(len(class_ids)):
        name, colour = CLASS_NAMES[class_ids[i] - 1], colours[i]
        words = f"{colour} {name}" if rng.random() < 0.75 else name
        phrases.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
        names.append(name)
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    setting = _SETTINGS.get(backdrop, f"on {backdrop}")
    return f"{rng.choice(_OPENINGS)}{listed} {setting}", [*names, backdrop]
