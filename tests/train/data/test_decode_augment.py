"""Decoding and augmentation against Pillow."""

import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from interloom.train.data import augment as augmentation
from interloom.train.data.augment import AugmentConfig, augment, erase, normalise, uniforms
from interloom.train.data.decode import Picture, centre_box, decode_box_into, decode_rgb, random_box
from interloom.train.data.report import BadSample
from PIL import Image, ImageEnhance, ImageOps


def smooth(height=90, width=130, seed=0, cell=10) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // cell, width // cell, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_orientation_is_that_of_pillow(turn, form):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True} if form == "WEBP" else {"quality": 95}
    data = encode(smooth(), form, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    picture = Picture(data)
    assert (picture.height, picture.width) == expected.shape[:2]
    assert np.abs(picture.decode().astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
    ],
)
def test_opaque_modes_are_converted_as_pillow_does(mode, form):
    data = encode(smooth().convert(mode), form)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_rgb(data) - expected).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    alpha = Image.new("L", (130, 90), 255)
    alpha.paste(0, (0, 0, 65, 90))
    image = smooth()
    image.putalpha(alpha)
    data = encode(image.quantize(64) if mode == "P" else image.convert(mode), "PNG")
    pixels = decode_rgb(data)
    assert (pixels[:, :65] == 255).all()
    assert (pixels[:, 65:] < 250).any()


def test_sixteen_bits_are_scaled():
    ramp = np.arange(0, 65536, 8, dtype=np.uint16).reshape(64, 128)
    pixels = decode_rgb(encode(Image.fromarray(ramp), "PNG"))
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


def claimed_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_bombs_are_refused_by_their_header():
    jpeg = bytearray(encode(smooth(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    for data in (claimed_png(9000, 9000), claimed_png(100000, 100000), bytes(jpeg)):
        with pytest.raises(BadSample, match="too many pixels"):
            Picture(data, "bomb")
    with pytest.raises(BadSample, match=r"130 × 90, at most 1000"):
        Picture(encode(smooth(), "JPEG"), max_pixels=1000)


def test_any_damage_is_a_bad_sample():
    generator = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP"):
        whole = encode(smooth(), form)
        damaged = [whole[: len(whole) * k // 20] for k in range(20)]
        for _ in range(60):
            flipped = bytearray(whole)
            for place in generator.integers(0, len(whole), 3):
                flipped[place] ^= int(generator.integers(1, 256))
            damaged.append(bytes(flipped))
        broken = 0
        for data in [*damaged, b"", b"<html>not found</html>", b"\xff\xd8\xff", generator.bytes(500)]:
            try:
                assert decode_rgb(data).shape[2] == 3
            except BadSample:
                broken += 1
        assert broken >= 24  # all that are cut short, and all that is no image
    for form in ("PPM", "TGA", "EPS", "PCX", "ICO"):
        with pytest.raises(BadSample, match="not an image"):
            Picture(encode(smooth(), form))


@pytest.mark.parametrize("size", [24, 64, 100])
def test_reduced_decoding_looks_like_full_decoding(size):
    # Detail coarse enough that half a pixel of the reduced scale, to which boxes are rounded, is little.
    image = smooth(400, 600, cell=100)
    data = encode(image, "JPEG", quality=95)
    batch = torch.zeros(2, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for box in (centre_box(400, 600, 1.0), (37, 101, 250, 333), (0, 0, 400, 600), (10, 20, 12, 9)):
        decode_box_into(Picture(data), box, batch[1])
        top, left, height, width = box
        expected = Image.open(io.BytesIO(data)).resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        difference = np.abs(batch[1].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
        assert difference.mean() < 4
    assert not batch[0].any()


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_the_filter_is_pillows(resample):
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    batch = torch.zeros(1, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    decode_box_into(Picture(encode(Image.fromarray(noise), "PNG")), (10, 0, 70, 70), batch[0], int(resample))
    expected = Image.fromarray(noise[10:80]).resize((32, 32), resample)
    difference = np.abs(batch[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
    assert difference.max() <= 1


def test_reduced_decoding_reads_fewer_pixels():
    picture = Picture(encode(smooth(800, 1200), "JPEG"))
    assert picture.decode(100, 150).shape == (100, 150, 3)
    assert picture.decode(101, 150).shape == (200, 300, 3)
    assert picture.decode().shape == (800, 1200, 3)


def reference_box(seed: int) -> tuple[float, float]:
    """Area share and logarithm of the aspect of a random resized crop of 400 × 300, by the standard library."""
    generator = random.Random(seed)
    for _ in range(10):
        area = 120_000 * generator.uniform(0.08, 1.0)
        aspect = math.exp(generator.uniform(math.log(0.75), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= 400 and height <= 300:
            return width * height / 120_000, math.log(width / height)
    return 1.0, math.log(4 / 3)


def test_random_boxes_follow_their_distribution():
    draws = uniforms(3, np.arange(4000), "crop", 10, 4)
    boxes = np.array([random_box(300, 400, draw, (0.08, 1.0), (0.75, 4 / 3)) for draw in draws])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    area, ratio = height * width / 120_000, width / height
    assert 0.078 < area.min() < 0.09
    expected_area, expected_aspect = np.mean([reference_box(seed) for seed in range(4000)], axis=0)
    assert area.mean() == pytest.approx(expected_area, abs=0.015)
    assert np.log(ratio).mean() == pytest.approx(expected_aspect, abs=0.015)
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert random_box(10, 1000, draws[0], (0.9, 1.0), (0.75, 4 / 3))[2:] == pytest.approx((10, 40 / 3))


def as_batch(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


GREY = (124, 116, 104)
AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR
# magnitude 9 of 10, positive sign
PILLOW = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "rotate": lambda x: x.rotate(27, BILINEAR, fillcolor=GREY),
    "posterize": lambda x: ImageOps.posterize(x, 1),
    "solarize": lambda x: ImageOps.solarize(x, 26),
    "solarize_add": lambda x: x.point(lambda v: min(255, v + 99) if v < 128 else v),
    "color": lambda x: ImageEnhance.Color(x).enhance(1.81),
    "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.81),
    "brightness": lambda x: ImageEnhance.Brightness(x).enhance(1.81),
    "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(1.81),
    "shear_x": lambda x: x.transform(x.size, AFFINE, (1, -0.27, 0, 0, 1, 0), BILINEAR, fillcolor=GREY),
    "shear_y": lambda x: x.transform(x.size, AFFINE, (1, 0, 0, -0.27, 1, 0), BILINEAR, fillcolor=GREY),
    "translate_x": lambda x: x.transform(x.size, AFFINE, (1, 0, -52.65, 0, 1, 0), BILINEAR, fillcolor=GREY),
    "translate_y": lambda x: x.transform(x.size, AFFINE, (1, 0, 0, 0, 1, -36.45), BILINEAR, fillcolor=GREY),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_do_what_pillows_do(name):
    image = smooth()
    assert list(PILLOW) == list(augmentation._OPERATIONS)
    got = augmentation._OPERATIONS[name](as_batch(image), torch.tensor([0.9]), torch.ones(1)).clamp(0, 1)
    difference = (got - as_batch(PILLOW[name](image))).abs()
    assert difference.median() < 0.01
    assert difference.mean() < 0.02  # borders of warps differ by half a pixel


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(randaugment_ops=0)])
def test_augmentation_belongs_to_the_sample(config):
    images = torch.cat([as_batch(smooth(48, 48, seed)) for seed in range(24)])
    positions = np.arange(1000, 1024)

    def run(rows: slice) -> torch.Tensor:
        out = augment(images[rows], positions[rows], 7, config)
        return erase(normalise(out, (0.5,) * 3, (0.5,) * 3), positions[rows], 7, config.erase)

    whole = run(slice(None))
    assert torch.equal(torch.cat([run(slice(0, 5)), run(slice(5, 6)), run(slice(6, 24))]), whole)
    other = erase(
        normalise(augment(images, positions, 8, config), (0.5,) * 3, (0.5,) * 3), positions, 8, 0.25
    )
    assert not torch.equal(other, whole)
    assert not torch.equal(run(slice(0, 1)), normalise(images[:1], (0.5,) * 3, (0.5,) * 3))


def test_probabilities_are_kept():
    positions = np.arange(400)
    images = torch.zeros(400, 3, 16, 16)
    images[..., 8:] = 1
    off = AugmentConfig(randaugment_ops=0, color_jitter=0.0)
    flipped = augment(images, positions, 3, off)[:, 0, 0, 0] == 1
    assert 170 < int(flipped.sum()) < 230
    erased = erase(torch.zeros(400, 3, 16, 16), positions, 3, 0.25).flatten(1).any(1)
    assert 70 < int(erased.sum()) < 130


def test_uniform_numbers_are_uniform_and_uncorrelated():
    draws = uniforms(11, np.arange(20_000), "test", 5)
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01
    assert np.abs(draws.std(0) - 12**-0.5).max() < 0.01
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.03
    assert np.abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03
    assert np.array_equal(draws[300:310], uniforms(11, np.arange(300, 310), "test", 5))


def test_normalise_is_in_float32_whatever_the_layout():
    pixels = torch.randint(0, 256, (3, 8, 9, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = normalise(pixels, mean, std)
    assert got.is_contiguous()
    assert torch.allclose(got.double(), expected, atol=1e-5)
