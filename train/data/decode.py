"""Images from untrusted bytes, at the size they are needed.

A :class:`Picture` reads the header first: what it is, how large, which way up. Only then, and only if the
pixel count is within bounds, are pixels decoded: JPEGs by libjpeg-turbo at the smallest of its scales
(1/8 … 1) that still covers what is asked for, everything else by Pillow. :func:`resize_into` cuts and scales
the result straight into its row of a batch. On 512-px JPEGs this takes a quarter of the time of decoding in
full with Pillow and resizing.

Whatever cannot be decoded is a :class:`~.report.BadSample`; no exception of a codec gets out.
"""

from __future__ import annotations

import io
import math
import os

import numpy as np
import simplejpeg
import torch
from PIL import Image

from ...models import pictures
from ...models.pictures import MAX_PIXELS, PictureError
from .report import BadSample

Box = tuple[float, float, float, float]
# What a shard holds as it came; the other formats that are read become PNG.
STORED = ("jpg", "png", "webp")
JPEG_QUALITY = 92
FILTERS = {int(filter): filter.name.lower() for filter in Image.Resampling}
BICUBIC = int(Image.Resampling.BICUBIC)


class Picture:
    """Header of an encoded image; pixels on demand, by the rule of :mod:`~...models.pictures`.

    Args:
        data: a picture of any format that is read, whatever the name says.
        name: for messages.
        max_pixels: larger images are refused before any pixel is decoded.

    Attributes:
        height, width: in pixels, the right way up.
        extension: of the format it is in.
        transparent: whether anything in it may be.

    Raises:
        BadSample: not an image, or beyond a limit.
    """

    def __init__(self, data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
        self.name, self._data, self._max_pixels = name, data, max_pixels
        image = self._open()
        self.extension = pictures.FORMATS[str(image.format)]
        self._turn = pictures.orientation(image)
        self.width, self.height = pictures.upright_size(image, self._turn)
        self.transparent = image.has_transparency_data
        self._pillow: Image.Image | None = image
        self._fast = self.extension == "jpg" and image.mode in ("RGB", "L") and self._turbo_agrees(image.size)

    def _open(self) -> Image.Image:
        try:
            return pictures.open_picture(self._data, self.name, self._max_pixels)
        except PictureError as error:
            raise BadSample(error.reason, self.name, error.detail) from None

    def _turbo_agrees(self, size: tuple[int, int]) -> bool:
        """Whether libjpeg-turbo reads the same size from the header as the limits were held against."""
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(self._data)
        except (ValueError, RuntimeError):
            return False
        return (width, height) == size and space in ("YCbCr", "RGB", "Gray")

    def decode(self, min_height: int = 0, min_width: int = 0) -> np.ndarray:
        """Pixels uint8 [h, w, 3], RGB, the right way up; transparency lies on white.

        The array may be smaller than the image, in proportion, but not below ``min_height`` × ``min_width``
        unless the image itself is. Zeros ask for full size.

        Raises:
            BadSample: broken or truncated.
        """
        if self._turn >= 5:
            min_height, min_width = min_width, min_height
        if self._fast:
            try:
                pixels = simplejpeg.decode_jpeg(
                    self._data,
                    "RGB",
                    min_height=min_height,
                    min_width=min_width,
                    # Without bounds libjpeg-turbo would take a smaller scale for "any".
                    min_factor=1,
                )
                return _upright(pixels, self._turn)
            except (ValueError, RuntimeError):
                # Strict decoding also refuses stray bytes between markers; Pillow tells them from damage.
                pass
        image, self._pillow = self._pillow or self._open(), None
        if self.extension == "jpg" and min_height and min_width:
            image.draft(None, (min_width, min_height))
        try:
            return np.array(pictures.to_rgb(image, self.name))
        except PictureError as error:
            raise BadSample(error.reason, self.name, error.detail) from None

    def stored(self, max_side: int | None = None) -> tuple[str, bytes]:
        """Extension and bytes to keep in a shard: as they came, once they have proved to decode.

        Longer sides than ``max_side`` are scaled down to it (Lanczos), into a JPEG, or into a PNG that keeps what
        is transparent; formats that shards do not hold become PNG. Both are the right way up.

        Raises:
            BadSample: broken or truncated.
        """
        small = max_side is None or max(self.height, self.width) <= max_side
        if small and self.extension in STORED:
            self.decode(min(32, self.height), min(32, self.width))  # whole and sound, at little cost
            return self.extension, bytes(self._data)
        if small or max_side is None:
            return "png", _encoded(Image.fromarray(self.decode()), "PNG")
        ratio = max_side / max(self.height, self.width)
        height, width = max(1, round(self.height * ratio)), max(1, round(self.width * ratio))
        if self.transparent:
            # Premultiplied, so that the colour below what is clear does not bleed into what is not.
            clear = self._clear().convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
            return "png", _encoded(clear.convert("RGBA"), "PNG")
        # Half of it by libjpeg at most, the rest by a filter that does not alias.
        pixels = self.decode(min(self.height, 2 * height), min(self.width, 2 * width))
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return "jpg", _encoded(image, "JPEG", quality=JPEG_QUALITY)

    def _clear(self) -> Image.Image:
        """The picture the right way up with its alpha."""
        try:
            image = pictures.upright(self._open())
            if image.mode.startswith("I"):
                return pictures.to_rgb(image, self.name).convert("RGBA")
            return image.convert("RGBA")
        except (OSError, ValueError, SyntaxError, MemoryError) as error:
            raise BadSample("broken image", self.name, f"{type(error).__name__}: {error}"[:120]) from None


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undo an EXIF orientation; a view where possible."""
    if turn in (2, 5, 7):
        pixels = pixels[:, ::-1]
    elif turn == 4:
        pixels = pixels[::-1]
    if turn == 3:
        return pixels[::-1, ::-1]
    if turn in (5, 8):
        return np.rot90(pixels)
    if turn in (6, 7):
        return np.rot90(pixels, -1)
    return pixels


def centre_box(height: int, width: int, ratio: float) -> Box:
    """Largest centred box (top, left, height, width) with ``ratio`` = width / height."""
    box_height, box_width = min(height, width / ratio), min(width, height * ratio)
    return (height - box_height) / 2, (width - box_width) / 2, box_height, box_width


def random_box(
    height: int, width: int, uniform: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Box (top, left, height, width) of a random resized crop.

    Area share uniform in ``scale``, aspect log-uniform in ``ratio``, ten tries, then the largest centred box
    (Szegedy et al. 2015, in the form that DeiT and GroupViT use).

    Args:
        uniform: [10, 4] numbers in [0, 1): the draw is theirs alone.
    """
    area = height * width * (scale[0] + uniform[:, 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + uniform[:, 1] * (high - low))
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    if not fits.any():
        return centre_box(height, width, min(max(width / height, ratio[0]), ratio[1]))
    i = int(np.argmax(fits))
    box_height, box_width = int(heights[i]), int(widths[i])
    top = math.floor(uniform[i, 2] * (height - box_height + 1))
    left = math.floor(uniform[i, 3] * (width - box_width + 1))
    return top, left, box_height, box_width


def decode_box_into(picture: Picture, box: Box, out: torch.Tensor, resample: int = BICUBIC) -> None:
    """Decode what a box of a picture needs and scale it (antialiased) into ``out``.

    Args:
        box: (top, left, height, width) in pixels of the whole picture.
        out: uint8 [3, H, W], best a channels-last row of a batch: it is then written without a copy.
        resample: number of a Pillow filter.

    Raises:
        BadSample: broken or truncated.
    """
    top, left, height, width = box
    rows, columns = out.shape[1:]
    pixels = picture.decode(
        min(picture.height, math.ceil(picture.height * rows / height)),
        min(picture.width, math.ceil(picture.width * columns / width)),
    )
    up, across = pixels.shape[0] / picture.height, pixels.shape[1] / picture.width
    first_row, first_column = round(top * up), round(left * across)
    last_row = min(pixels.shape[0], max(first_row + 1, round((top + height) * up)))
    last_column = min(pixels.shape[1], max(first_column + 1, round((left + width) * across)))
    resize_into(pixels[first_row:last_row, first_column:last_column], out, resample)


def check_filter(resample: object) -> None:
    """
    Raises:
        ValueError: no Pillow filter has this number.
    """
    if resample not in FILTERS:
        raise ValueError(
            f"data.resample={resample} given, expected the number of a Pillow filter: "
            f"{', '.join(f'{number} {name}' for number, name in FILTERS.items())}"
        )


def resize_into(pixels: np.ndarray, out: torch.Tensor, resample: int = BICUBIC) -> None:
    """Scale uint8 [h, w, 3] by a Pillow filter (antialiased) into uint8 ``out`` [3, H, W]."""
    if pixels.shape[:2] == out.shape[1:]:
        out.copy_(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
        return
    if resample != BICUBIC:  # PyTorch's is the faster, and the usual one
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image = image.resize((out.shape[2], out.shape[1]), Image.Resampling(resample))
        out.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bicubic2d_aa.out(image, list(out.shape[1:]), False, None, None, out=out[None])


def decode_file(path: str | os.PathLike[str]) -> np.ndarray:
    """Full-size pixels uint8 [h, w, 3] of a picture file.

    Raises:
        BadSample: it cannot be had; the reason says why.
    """
    try:
        data = pictures.read_picture_file(path)
    except PictureError as error:
        raise BadSample(error.reason, error.name, error.detail) from None
    return decode_rgb(data, os.fspath(path))


def decode_rgb(data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Full-size pixels uint8 [h, w, 3] of an encoded image.

    Raises:
        BadSample: not an image, too large, broken or truncated.
    """
    return Picture(data, name, max_pixels).decode()


__all__ = [
    "MAX_PIXELS",
    "Picture",
    "centre_box",
    "check_filter",
    "decode_box_into",
    "decode_file",
    "decode_rgb",
    "random_box",
    "resize_into",
]
