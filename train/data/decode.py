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
import struct
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image

from .report import BadSample

# Enough for a 64-megapixel camera; a bomb of 10 kB can claim gigapixels.
MAX_PIXELS = 64_000_000
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_EXIF_WINDOW = 1 << 16
Box = tuple[float, float, float, float]


class Picture:
    """Header of an encoded image; pixels on demand.

    Args:
        data: JPEG, PNG or WebP bytes, whatever the name says.
        name: for messages.
        max_pixels: larger images are refused before any pixel is decoded.

    Attributes:
        height, width: in pixels, the right way up.

    Raises:
        BadSample: not an image, or too large.
    """

    def __init__(self, data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
        self.name, self._data, self._pillow, self._turn = name, data, None, 1
        if len(data) == 0:
            raise BadSample("empty image", name)
        if bytes(data[:3]) == b"\xff\xd8\xff":
            try:
                height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            except (ValueError, RuntimeError):
                space, height, width = "", 0, 0
            if space in ("YCbCr", "RGB", "Gray"):
                self._set_size(int(height), int(width), max_pixels)  # type: ignore[arg-type]
                self._set_orientation(_orientation(data))
                return
        self._open(max_pixels)

    def _open(self, max_pixels: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self._pillow = Image.open(io.BytesIO(self._data), formats=_FORMATS)
            width, height = self._pillow.size
            self._set_size(height, width, max_pixels)
            self._set_orientation(self._pillow.getexif().get(_ORIENTATION, 1))
        except BadSample:
            raise
        except Image.DecompressionBombError as error:
            raise BadSample("too many pixels", self.name, str(error)[:100]) from None
        except Exception as error:  # codecs raise nearly anything on hostile bytes
            raise BadSample("not an image", self.name, _short(error)) from None

    def _set_size(self, height: int, width: int, max_pixels: int) -> None:
        if height * width > max_pixels:
            raise BadSample("too many pixels", self.name, f"{width} × {height}, at most {max_pixels}")
        if min(height, width) < 1:
            raise BadSample("not an image", self.name, f"{width} × {height} pixels")

        self.height, self.width = height, width

    def _set_orientation(self, turn: object) -> None:
        if isinstance(turn, int) and 1 <= turn <= 8:
            self._turn = turn
        if self._turn >= 5:
            self.height, self.width = self.width, self.height

    def decode(self, min_height: int = 0, min_width: int = 0) -> np.ndarray:
        """Pixels uint8 [h, w, 3], RGB, the right way up; transparency lies on white.

        The array may be smaller than the image, in proportion, but not below ``min_height`` × ``min_width``
        unless the image itself is. Zeros ask for full size.

        Raises:
            BadSample: broken or truncated.
        """
        if self._turn >= 5:
            min_height, min_width = min_width, min_height
        if self._pillow is None:
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
        try:
            image = self._pillow or Image.open(io.BytesIO(self._data), formats=_FORMATS)
            self._pillow = None
            if image.format == "JPEG" and min_height and min_width:
                image.draft(None, (min_width, min_height))
            return _upright(np.array(_to_rgb(image)), self._turn)
        except Exception as error:
            raise BadSample("broken image", self.name, _short(error)) from None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:120]


def _orientation(data: bytes | memoryview) -> int:
    """EXIF orientation 1 to 8 of a JPEG, read from its first APP1 segment; 1 when in doubt."""
    head = bytes(data[:_EXIF_WINDOW])
    start = head.find(b"Exif\0\0", 0, 4096)
    if start < 0:
        return 1
    tiff = head[start + 6 :]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for i in range(min(count, 200)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, directory + 2 + 12 * i)
            if tag == _ORIENTATION and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB: 16-bit scaled, transparency composed over white, the rest converted."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8))
    if image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA") if "transparency" in image.info else image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


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


def decode_box_into(picture: Picture, box: Box, out: torch.Tensor) -> None:
    """Decode what a box of a picture needs and scale it (bicubic, antialiased) into ``out``.

    Args:
        box: (top, left, height, width) in pixels of the whole picture.
        out: uint8 [3, H, W], best a channels-last row of a batch: it is then written without a copy.

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
    resize_into(pixels[first_row:last_row, first_column:last_column], out)


def resize_into(pixels: np.ndarray, out: torch.Tensor) -> None:
    """Scale uint8 [h, w, 3] (bicubic, antialiased) into uint8 ``out`` [3, H, W]."""
    if pixels.shape[:2] == out.shape[1:]:
        out.copy_(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1))
        return
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    torch.ops.aten._upsample_bicubic2d_aa.out(image, list(out.shape[1:]), False, None, None, out=out[None])


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
    "decode_box_into",
    "decode_rgb",
    "random_box",
    "resize_into",
]
