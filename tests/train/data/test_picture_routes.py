"""One picture, many ways in: every route gives the same pixels, whatever the file is like."""

import io

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interloom.models.groupvit.image_processing import GroupViTImageProcessor
from interloom.models.idefics.image_processing import IdeficsImageProcessor
from interloom.train.commands.generate import picture as generate_picture
from interloom.train.commands.segment import read_image
from interloom.train.data.decode import Picture, decode_file, decode_rgb
from interloom.train.data.documents.images import ImageLoader
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.records import Document
from interloom.train.data.documents.records import Picture as Part
from interloom.train.data.report import SkipReport
from interloom.train.evaluation.groupvit.segmentation_data import decode_mask
from PIL import Image, ImageOps

MODES = {
    "JPEG": ["RGB", "L", "CMYK"],
    "PNG": ["RGB", "RGBA", "L", "LA", "P", "P+tRNS", "1", "I;16", "RGB+tRNS"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["P", "P+tRNS", "L"],
    "BMP": ["RGB", "L", "P", "1"],
    "TIFF": ["RGB", "RGBA", "L", "LA", "CMYK", "I;16", "I;16B", "I", "F", "1", "P"],
}
PROFILE = np.random.default_rng(0).bytes(70_000)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """(what it is, an encoded picture)."""
    form = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[form]))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    if mode in ("I;16", "I;16B", "I"):
        values = rng.integers(0, 65_536, (height, width)).astype(np.uint16)
        image = Image.fromarray(values.astype(np.int32) if mode == "I" else values)
        if mode == "I;16B":
            image = Image.frombytes("I;16B", (width, height), values.astype(">u2").tobytes())
    elif mode == "F":
        image = Image.fromarray(rng.uniform(-90, 350, (height, width)).astype(np.float32))
    else:
        # Noise of single pixels is what no JPEG keeps, and scaled pictures are stored as such.
        cells = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 4), dtype=np.uint8)
        image = Image.fromarray(cells.repeat(8, 0).repeat(8, 1)[:height, :width])
        base = mode.partition("+")[0]
        image = image.convert("RGB").quantize(16) if base == "P" else image.convert(base)
    options: dict = {}
    if mode == "P+tRNS":
        options["transparency"] = int(np.asarray(image).flat[0])
    if mode == "RGB+tRNS":
        options["transparency"] = image.getpixel((0, 0))
    turn = draw(st.integers(1, 8))
    exif = Image.Exif()
    exif[0x0112] = turn
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = exif
    if form in ("JPEG", "PNG") and draw(st.booleans()):
        options["icc_profile"] = PROFILE
    if form == "JPEG":
        options |= {"progressive": draw(st.booleans()), "quality": draw(st.integers(5, 100))}
    if form == "WEBP":
        options["lossless"] = draw(st.booleans())
    if form in ("GIF", "WEBP") and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    out = io.BytesIO()
    image.save(out, form, **options)
    return f"{form} {mode} turn {turn}", out.getvalue()


def by_the_rule(data: bytes) -> np.ndarray:
    """What the file shows, written down from the rule in words, in float64."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        grey = np.floor(np.clip(np.asarray(image, np.float64), 0, 65_535) / 257 + 0.5)
        return np.repeat(grey[..., None], 3, -1)
    if image.has_transparency_data:
        values = np.asarray(image.convert("RGBA")).astype(np.float64)
        alpha = values[..., 3:] / 255
        return values[..., :3] * alpha + 255 * (1 - alpha)
    return np.asarray(image.convert("RGB")).astype(np.float64)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_all_routes_show_the_same_pixels(tmp_path_factory, drawn):
    what, data = drawn
    folder = tmp_path_factory.mktemp("routes")
    path = folder / "picture.jpg"  # the name is no evidence
    path.write_bytes(data)
    pixels = decode_rgb(data)
    assert np.abs(pixels - by_the_rule(data)).max() <= 1, what

    same = {"segment": read_image(path), "evaluation": decode_file(path)}
    raw = GroupViTImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    with Image.open(path) as opened:
        for name, image in {"path": path, "text": str(path), "opened": opened, "array": pixels}.items():
            same[f"GroupViT, {name}"] = raw.tensor(image)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    for name, found in same.items():
        assert np.array_equal(found, pixels), (what, name)

    idefics = IdeficsImageProcessor(image_size=30)
    expected = idefics(Image.fromarray(pixels))
    with Image.open(path) as opened:
        for image in (path, opened, generate_picture(str(path))):
            assert torch.equal(idefics(image), expected), what

    # The builders store what decodes to the same; scaled, it looks the same.
    extension, kept = Picture(data).stored()
    assert extension in ("jpg", "png", "webp")
    assert np.array_equal(decode_rgb(kept), pixels), what
    options = ConvertOptions("", image_root=str(folder))
    with ImageLoader(options, SkipReport()) as loader:
        document = Document("k", (Part("picture.jpg"),))
        (part,) = loader.checked(next(loader.located(iter([document])))).pictures
    assert part.data == kept
    assert (part.height, part.width) == pixels.shape[:2]
    height, width = pixels.shape[:2]
    side = max(1, max(height, width) // 2)
    small = decode_rgb(Picture(data).stored(side)[1])
    assert max(small.shape[:2]) == side or max(height, width) == 1
    reference = Image.fromarray(pixels).resize((small.shape[1], small.shape[0]), Image.Resampling.LANCZOS)
    if min(small.shape[:2]) >= 8:
        assert np.abs(small.astype(float) - np.asarray(reference)).mean() < 24, what


def test_masks_are_turned_with_their_pictures():
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        out = io.BytesIO()
        Image.fromarray(ids).save(out, "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue()))))
        assert np.array_equal(decode_mask(out.getvalue(), "mask"), expected)
