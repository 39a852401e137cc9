"""The rule about images, against Pillow and against what the rule says in words; limits and hostile files."""

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from interloom.models import pictures
from interloom.models.groupvit.image_processing import GroupViTImageProcessor
from interloom.models.idefics.image_processing import IdeficsImageProcessor
from interloom.models.pictures import PictureError, as_rgb, load_labels, load_rgb
from PIL import Image, ImageOps


def gradient(height=20, width=32) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    array = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 4 % 256], -1)
    return Image.fromarray(array.astype(np.uint8))


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(load_rgb(data))


def on_white(image: Image.Image) -> np.ndarray:
    """Straight alpha over white, in float64."""
    values = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


def exif(orientation: int, kind: int = 3) -> bytes:
    """EXIF whose orientation is a SHORT (3) or a LONG (4), as some writers have it."""
    value = struct.pack("<HH", orientation, 0) if kind == 3 else struct.pack("<I", orientation)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def with_xmp(data: bytes, orientation: int) -> bytes:
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
        % orientation
    )
    body = b"http://ns.adobe.com/xap/1.0/\0" + xmp
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_way_of_saying_which_way_up(turn):
    image = gradient()
    profile = np.random.default_rng(0).bytes(90_000)
    files = [
        encode(image, "JPEG", exif=exif(turn)),
        encode(image, "JPEG", exif=exif(turn, 4)),
        encode(image, "JPEG", exif=exif(turn), icc_profile=profile),
        with_xmp(encode(image, "JPEG"), turn),
        encode(image, "PNG", exif=exif(turn)[6:]),
        encode(image, "WEBP", exif=exif(turn), lossless=True),
        encode(image, "TIFF", tiffinfo={0x0112: turn}),
    ]
    for number, data in enumerate(files):
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(pixels(data), expected), number
        assert expected.shape == ((20, 32, 3) if turn < 5 else (32, 20, 3)), number


def test_damaged_exif_says_nothing():
    for bad in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(9), exif(0), os.urandom(40)):
        data = encode(gradient(), "JPEG", exif=bad)
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_transparency_lies_on_white_in_every_mode():
    image = gradient().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (20, 1))))
    grey = image.convert("LA")
    palette = gradient().quantize(32)
    for candidate in (image, grey, grey.convert("La"), image.convert("RGBa")):
        expected = on_white(candidate.convert("LA" if candidate.mode == "La" else "RGBA"))
        assert np.abs(np.asarray(as_rgb(candidate)) - expected).max() <= 1, candidate.mode
    files = {
        "RGBA": encode(image, "PNG"),
        "LA": encode(grey, "PNG"),
        "WebP": encode(image, "WEBP", lossless=True),
        "TIFF": encode(image, "TIFF"),
        "palette, one colour": encode(palette, "PNG", transparency=3),
        "palette, bytes": encode(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "GIF": encode(palette, "GIF", transparency=5),
        "RGB and a colour": encode(gradient(), "PNG", transparency=gradient().getpixel((4, 4))),
        "L and a grey": encode(gradient().convert("L"), "PNG", transparency=40),
        "1": encode(gradient().convert("1"), "PNG", transparency=0),
    }
    for name, data in files.items():
        expected = on_white(Image.open(io.BytesIO(data)))
        assert (expected != np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3]).any(), name
        assert np.abs(pixels(data) - expected).max() <= 1, name
    grey16 = Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    data = encode(grey16, "PNG", transparency=30_000)
    assert (pixels(data) == 255).all()


def test_sixteen_bits_are_divided_by_257():
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    expected = np.floor(ramp / 257 + 0.5)
    big = Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes())
    for image in (Image.fromarray(ramp), big, Image.fromarray(ramp.astype(np.int32))):
        assert np.array_equal(np.asarray(as_rgb(image))[..., 0], expected), image.mode
    for data in (
        encode(Image.fromarray(ramp), "PNG"),
        encode(Image.fromarray(ramp), "TIFF"),
        encode(big, "TIFF"),
    ):
        assert np.array_equal(pixels(data)[..., 1], expected)
    assert (np.asarray(as_rgb(np.full((2, 2, 3), 30_000, np.uint16))) == 117).all()
    beyond = Image.fromarray(np.array([[-5, 10**6]], np.int32))
    assert np.asarray(as_rgb(beyond))[0, :, 0].tolist() == [0, 255]


def test_the_rest_is_as_pillow_converts():
    image = gradient()
    floats = Image.fromarray(np.array([[-7.0, 0.6, 117.4, 254.9, 300.0]], np.float32))
    files = {
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "CMYK TIFF": encode(image.convert("CMYK"), "TIFF"),
        "1": encode(image.convert("1"), "PNG"),
        "L": encode(image.convert("L"), "JPEG"),
        "P": encode(image.quantize(16), "PNG"),
        "BMP": encode(image, "BMP"),
        "GIF": encode(image, "GIF"),
        "F": encode(floats, "TIFF"),
        "LZW": encode(image, "TIFF", compression="tiff_lzw"),
        "JPEG in TIFF": encode(image, "TIFF", compression="jpeg"),
    }
    for name, data in files.items():
        assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), name
    adobe = encode(image.convert("CMYK"), "JPEG")
    assert b"Adobe" in adobe  # Pillow writes these inverted, as Photoshop does
    assert np.abs(pixels(adobe).astype(int) - np.asarray(image)).mean() < 12
    hole = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 9.0]], np.float32))
    assert np.asarray(as_rgb(hole))[0, :, 0].tolist() == [0, 255, 0, 9]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(form):
    first, second = gradient(), ImageOps.invert(gradient())
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(first, form, save_all=True, append_images=[second] * 3, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data), expected)
    assert np.abs(expected.astype(int) - np.asarray(first)).mean() < 12


def test_floats_and_integers_of_arrays():
    whole = np.asarray(gradient())
    expected = np.asarray(as_rgb(whole))
    for array in (
        whole / 255,
        whole.astype(np.float64),
        whole.astype(np.int64),
        whole.astype(np.uint16),
        torch.from_numpy(whole.copy()).permute(2, 0, 1),
        torch.from_numpy(whole / 255),
    ):
        assert np.array_equal(np.asarray(as_rgb(array)), expected)
    assert np.asarray(as_rgb(torch.ones(3, 2, 2, dtype=torch.bfloat16))).min() == 255
    normalised = whole / 127.5 - 1
    for bad in (
        normalised,
        whole / whole.max() * 1.02,
        whole.astype(np.int64) + 9,
        whole.astype(np.int64) - 9,
    ):
        with pytest.raises(ValueError, match=r"values from .* expected"):
            as_rgb(bad)
    with pytest.raises(ValueError, match="NaN"):
        as_rgb(np.full((2, 2, 3), np.nan))


def test_opened_pictures_and_paths_are_the_same(tmp_path):
    path = tmp_path / "turned.jpg"
    path.write_bytes(encode(gradient(), "JPEG", exif=exif(6)))
    expected = np.asarray(load_rgb(path))
    assert expected.shape == (32, 20, 3)
    with Image.open(path) as lazy:
        assert np.array_equal(np.asarray(as_rgb(lazy)), expected)
    with Image.open(path) as loaded:
        loaded.load()
        assert np.array_equal(np.asarray(as_rgb(loaded)), expected)
    processor = GroupViTImageProcessor()
    assert torch.equal(processor.tensor(str(path)), processor.tensor(path))


def test_label_maps_keep_their_values():
    ids = np.arange(640, dtype=np.uint16).reshape(20, 32)
    assert np.array_equal(load_labels(encode(Image.fromarray(ids), "PNG")), ids)
    palette = gradient().quantize(16)
    assert np.array_equal(load_labels(encode(palette, "PNG")), np.asarray(palette))
    with pytest.raises(PictureError):
        load_labels(encode(gradient(), "EPS"))


@pytest.mark.parametrize("form", ["EPS", "PPM", "PCX", "ICO", "TGA", "SGI", "PDF", "JPEG2000"])
def test_formats_beyond_the_list_are_never_decoded(form, tmp_path, monkeypatch):
    data = encode(gradient(), form)
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a program"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("started a program"))
    for source in (data, path, str(path)):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            load_rgb(source)
    if form not in ("PDF", "ICO"):  # Pillow knows no PDF, and decodes an icon while it opens it
        with Image.open(path) as opened, pytest.raises(ValueError, match=f"{opened.format} is not opened"):
            as_rgb(opened)


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def scans(size: tuple[int, int], count: int) -> bytes:
    """A progressive JPEG whose last scan comes ``count`` times."""
    data = encode(Image.new("RGB", size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def hostile() -> dict[str, bytes]:
    return {
        "scans": scans((2000, 2000), 2000),
        "scans of a large picture": scans((8000, 8000), 10),
        "a side": png(1, 60_000_000, zlib.compress(bytes(60_000_000 * 2))),
        "pixels": png(100_000, 50_000, b""),
        "claims": encode(gradient(), "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + bytes(100),
        "GIF": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(30),
        "nothing": b"",
    }


def test_hostile_files_cost_nothing():
    files = hostile()
    assert len(files["a side"]) < 150_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in files.items():
        began = time.perf_counter()
        with pytest.raises(PictureError) as error:
            load_rgb(data, "x.jpg")
        assert time.perf_counter() - began < 2, name
        assert str(error.value).startswith("x.jpg cannot be read as an image ("), name
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_scans_are_those_a_decoder_sees():
    assert pictures.count_scans(encode(gradient(), "JPEG")) == 1
    progressive = encode(gradient(), "JPEG", progressive=True)
    assert pictures.count_scans(progressive) == progressive.count(b"\xff\xda")
    # A thumbnail in EXIF and a film behind the picture (phones) are none of its scans.
    thumbnail = exif(1) + progressive
    inside = encode(gradient(), "JPEG", progressive=True, exif=thumbnail)
    assert pictures.count_scans(inside + b"\xff\xda\0\0" * 500) == progressive.count(b"\xff\xda")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path, tmp_path / "none.jpg", "a\0b.jpg"):
        began = time.perf_counter()
        with pytest.raises(PictureError, match="cannot be read as an image"):
            load_rgb(path)
        assert time.perf_counter() - began < 1
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(PictureError, match="too many bytes"):
        load_rgb(huge)


def test_a_checkpoint_cannot_ask_for_huge_images():
    for size in (20_000, 0, -3, 2.5, "224", None, True):
        with pytest.raises(ValueError, match="1 to 4096 pixels"):
            IdeficsImageProcessor(image_size=size)
        if size is not None:
            with pytest.raises(ValueError, match="pixels"):
                GroupViTImageProcessor.from_dict({"crop_size": {"height": size, "width": 224}})
    narrow = Image.new("1", (1, 60_000))
    with pytest.raises(ValueError, match="less narrow"):
        GroupViTImageProcessor().tensor(narrow)


@pytest.mark.faults
def test_the_largest_allowed_picture_stays_below_two_gigabytes():
    code = """
import io, resource, zlib
from PIL import Image
from interloom.models.pictures import load_rgb
from interloom.train.data.decode import decode_rgb
image = Image.new("RGBA", (8000, 7900), (1, 2, 3, 4))
out = io.BytesIO(); exif = Image.Exif(); exif[0x0112] = 6
image.save(out, "PNG", exif=exif, compress_level=1); del image
assert decode_rgb(out.getvalue()).shape == (8000, 7900, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peak = int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    assert peak < 2_000_000
