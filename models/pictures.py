"""Pictures from files, bytes and memory to RGB: the one rule that every route shares.

What is opened: JPEG, PNG, WebP, GIF, BMP and TIFF, told by content, and nothing else that Pillow has a plug-in
for (some start other programs). The header is looked at first; what claims more than :data:`MAX_PIXELS` or a side
over :data:`MAX_SIDE`, or hides more JPEG scans than a picture has, is refused before a pixel is decoded. Of files
with several frames the first counts, and no other is touched.

What comes out, in this order:

- the right way up, by the orientation in EXIF or XMP, as Pillow's ``exif_transpose`` reads it;
- 16 bits (and integers beyond) divided by 257, rounded, cut at 0 and 255; floats of a file are values of 0 to 255;
- what is transparent lies on white;
- everything else as Pillow's ``convert("RGB")`` makes it.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor

# By Pillow's name of the format; a JPEG with further pictures behind it (phones write them) is an MPO.
FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Enough for a 64-megapixel camera; a bomb of 10 kB can claim gigapixels.
MAX_PIXELS = 64_000_000
# The longest side of a JPEG. Pillow keeps a pointer a row, so that 1 x 60 M pixels take gigabytes.
MAX_SIDE = 65_535
MAX_BYTES = 400 * 2**20
# The longest side that a processor may be told to make: its settings come with a checkpoint.
MAX_RESIZED = 4096
# A progressive JPEG has about ten scans, and each costs a pass over all coefficients.
MAX_SCANS = 64
_MAX_SCAN_PIXELS = 15 * MAX_PIXELS

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A byte 255 that is followed by 0, a restart number or another 255 is no marker.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_TILE_HEIGHT, _TILE_WIDTH, _STRIP_ROWS = 323, 322, 278

ImageInput = Image.Image | np.ndarray | Tensor | str | os.PathLike[str]

_OBJECT = re.compile(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>")


class PictureError(ValueError):
    """A picture that cannot be used.

    Attributes:
        reason: short fixed phrase: ``empty image``, ``not an image``, ``too many pixels``, ``too many scans``,
            ``broken image``, ``not a file``, ``too many bytes``.
        name, detail: which picture, and what was found.
    """

    def __init__(self, reason: str, name: str, detail: str = "") -> None:
        self.reason, self.name, self.detail = reason, name, detail
        found = f"{reason}: {detail}" if detail else reason
        super().__init__(
            f"{name} cannot be read as an image ({found}); give a {FORMAT_NAMES} file of at most "
            f"{MAX_PIXELS // 10**6} million pixels."
        )


def read_picture_file(path: str | os.PathLike[str]) -> bytes:
    """Bytes of a picture file.

    Raises:
        PictureError: there is no such file, it is a pipe, a device or a folder, or larger than 400 MiB.
    """
    name = os.fspath(path)
    try:
        # Opening a pipe without this waits for its other end.
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PictureError("no such file", name) from None
    except (OSError, ValueError) as error:
        raise PictureError("not a file", name, _short(error)) from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise PictureError("not a file", name, "a folder, a pipe or a device")
        with open(handle, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1) if state.st_size <= MAX_BYTES else None
    except OSError as error:
        raise PictureError("not a file", name, _short(error)) from None
    finally:
        os.close(handle)
    if data is None or len(data) > MAX_BYTES:
        raise PictureError("too many bytes", name, f"at most {MAX_BYTES >> 20} MiB are read")
    return data


def open_picture(
    data: bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS
) -> ImageFile.ImageFile:
    """A picture whose header was judged and whose pixels are still encoded.

    Args:
        data: encoded, of any allowed format whatever its name says.
        name: for messages.

    Raises:
        PictureError: not an image of an allowed format, or beyond a limit.
    """
    if len(data) == 0:
        raise PictureError("empty image", name)
    if len(data) > MAX_BYTES:
        raise PictureError("too many bytes", name, f"at most {MAX_BYTES >> 20} MiB are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and broken EXIF; the limits here decide
            image = Image.open(io.BytesIO(data), formats=[form for form in FORMATS if form != "MPO"])
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", name, str(error)[:100]) from None
    except Exception as error:  # codecs raise nearly anything on hostile bytes
        raise PictureError("not an image", name, _short(error)) from None
    check_header(image, name, max_pixels)
    return image


def check_header(image: ImageFile.ImageFile, name: str = "image", max_pixels: int = MAX_PIXELS) -> None:
    """Judge a picture that Pillow has opened and not decoded yet.

    Raises:
        PictureError: its format is none of the list, or it is beyond a limit.
    """
    if image.format not in FORMATS:
        raise PictureError("not an image", name, f"{image.format} is not opened; load() it yourself first")
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError("too many pixels", name, f"{width} × {height}, at most {max_pixels}")
    if max(width, height) > MAX_SIDE:
        raise PictureError("too many pixels", name, f"{width} × {height}, a side at most {MAX_SIDE}")
    if min(width, height) < 1:
        raise PictureError("not an image", name, f"{width} × {height} pixels")
    stream = image.fp
    if stream is None or stream.closed:
        return
    if image.format in ("JPEG", "MPO"):
        scans, pixels = count_scans(_content(stream)), width * height
        if scans > MAX_SCANS:
            raise PictureError("too many scans", name, f"more than {MAX_SCANS}")
    elif image.format == "TIFF" and "jpeg" in str(image.info.get("compression")):
        # Each strip or tile is a JPEG of its own.
        scans, pixels = _content(stream).count(b"\xff\xda"), _strip_pixels(image)
    else:
        return
    if scans * pixels > _MAX_SCAN_PIXELS:
        raise PictureError("too many scans", name, f"{scans} of {width} × {height} pixels")


def count_scans(data: bytes) -> int:
    """Scans of a JPEG that a decoder goes through, counted no further than one beyond :data:`MAX_SCANS`."""
    position, scans, components, progressive = 2, 0, 0, True
    while scans <= MAX_SCANS and (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8):
            continue
        segment = data[position : position + 8]
        if marker in _FRAMES and len(segment) == 8:
            components, progressive = segment[7], marker in _PROGRESSIVE
        if marker == 0xDA:
            scans += 1
            if not progressive and segment[2:3] == bytes([components]):
                break  # all components in one scan: decoders stop behind it
        position += max(2, int.from_bytes(segment[:2], "big"))
    return scans


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8, from wherever Pillow finds it; 1 where nothing usable is said.

    Of a PNG this decodes the pixels, for the tag may stand behind them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing
        return 1
    return turn if isinstance(turn, int) and turn in _TURNS else 1


def upright_size(image: Image.Image, turn: int) -> tuple[int, int]:
    """(width, height) the right way up; Pillow gives a TIFF's so already."""
    width, height = image.size
    return (height, width) if turn >= 5 and image.format != "TIFF" else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """The picture the right way up, in its own mode.

    Raises:
        OSError, ValueError, …: whatever Pillow raises for broken pixels.
    """
    image.load()  # a TIFF turns itself while it loads, and then says so
    turn = orientation(image)
    return image if turn == 1 else image.transpose(_TURNS[turn])


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Any Pillow image as RGB, by the rule above.

    Raises:
        PictureError: it is still encoded and of no allowed format, beyond a limit, or broken.
    """
    if isinstance(image, ImageFile.ImageFile) and getattr(image, "_im", None) is None:
        check_header(image, name)
        if image.format == "TIFF" and image.tell() == 0 and image.fp is not None:
            # Of a file that it maps into memory Pillow exchanges the sides of a turned TIFF before it reads it.
            image = open_picture(_content(image.fp), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _colours(upright(image))
    except Exception as error:
        raise PictureError("broken image", name, _short(error)) from None


def load_rgb(
    source: str | os.PathLike[str] | bytes | memoryview, name: str = "image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """RGB picture of a file or of encoded bytes.

    Raises:
        PictureError: it cannot be had; the message says why.
    """
    if isinstance(source, (str, os.PathLike)):
        name, source = os.fspath(source), read_picture_file(source)
    return to_rgb(open_picture(source, name, max_pixels), name)


def load_labels(data: bytes | memoryview, name: str = "mask", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Values [H, W] of a label map (palette, grey of 8 or 16 bits), the right way up and not converted.

    Raises:
        PictureError: as :func:`open_picture`.
    """
    image = open_picture(data, name, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(upright(image))
    except Exception as error:
        raise PictureError("broken image", name, _short(error)) from None


def as_rgb(image: ImageInput) -> Image.Image:
    """Any accepted picture as an RGB Pillow image.

    Args:
        image: Pillow image; path of a file; array or tensor [H, W, 3] or [3, H, W], integers in 0..255 (of 16
            bits in 0..65535), or floats in 0..1 or in 0..255.

    Raises:
        ValueError: the file cannot be read, or the value is no picture.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            return load_rgb(image)
        except PictureError as error:
            if error.reason != "no such file" or not isinstance(image, str):
                raise
            # It may have been meant as an address, or as text.
            raise ValueError(f"images holds a str, and {error}") from None
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"images holds a {type(image).__name__}; give Pillow images, arrays, tensors or paths."
        )
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]) or 0 in image.shape:
        raise ValueError(
            f"an image has shape {list(image.shape)}; expected [H, W, 3] or [3, H, W] (RGB, three channels)."
        )
    return Image.fromarray(_bytes(image if image.shape[-1] == 3 else image.transpose(1, 2, 0)))


def _bytes(values: np.ndarray) -> np.ndarray:
    """uint8 of an array of any type."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(values.dtype, np.integer) and not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"an image holds {values.dtype}; expected integers or floats.")
    floats = np.issubdtype(values.dtype, np.floating)
    if floats and not np.isfinite(values).all():
        raise ValueError("an image holds NaN or infinite values; check how it was decoded.")
    low, high = values.min(), values.max()
    if values.dtype == np.uint16 and high > 255:
        return _eight_bits(values)
    if floats and low >= 0 and high <= 1:
        values = values * 255.0
    elif low < 0 or high > 255 or (floats and high < 2 and not (values == np.rint(values)).all()):
        expected = "floats in 0..1 or 0..255" if floats else "integers in 0..255"
        raise ValueError(
            f"an image holds values from {low:g} to {high:g}; expected {expected}: pass it before it is "
            "normalised, and clip what a filter left outside."
        )
    return np.rint(values).astype(np.uint8)


def _colours(image: Image.Image) -> Image.Image:
    """A decoded picture as RGB: depth, then transparency, then ``convert``."""
    clear: Any = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _eight_bits(values)
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        return Image.fromarray(values).convert("L").convert("RGB")
    palette = image.palette.mode if image.mode == "P" and image.palette else ""
    if clear is not None or palette.endswith("A") or image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        # Premultiplied alpha has no way to RGBA but by its own straight form.
        straight = {"La": "LA"}.get(image.mode)
        image = (image.convert(straight) if straight else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Integers of 16 bits, divided by 257 and rounded, uint8."""
    return ((np.clip(values, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)


def _content(stream: Any) -> bytes:
    """All bytes of an opened file, at most :data:`MAX_BYTES`; its position stays."""
    if isinstance(stream, io.BytesIO):
        return stream.getvalue()
    place = stream.tell()
    stream.seek(0)
    data = stream.read(MAX_BYTES)
    stream.seek(place)
    return data


def _strip_pixels(image: Any) -> int:
    tags, (width, height) = image.tag_v2, image.size
    across, rows = tags.get(_TILE_WIDTH, width), tags.get(_TILE_HEIGHT, tags.get(_STRIP_ROWS, height))
    known = isinstance(across, int) and isinstance(rows, int)
    return max(1, min(across, width) * min(rows, height)) if known else width * height


def _short(error: Exception) -> str:
    """What a library says, without the addresses of memory by which it names objects."""
    return f"{type(error).__name__}: {_OBJECT.sub('', str(error))}"[:120]


def check_side(value: Any, name: str) -> None:
    """Refuse what is no side of the images that a processor makes.

    Raises:
        ValueError: ``value`` is no whole number of 1 to 4096 pixels.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RESIZED:
        raise ValueError(
            f"{name}={str(value)[:80]!r} is no side of an image; expected a whole number of 1 to {MAX_RESIZED} pixels."
        )


def picture_suffix(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name is that of a picture."""
    return Path(name).suffix.lower() in SUFFIXES
