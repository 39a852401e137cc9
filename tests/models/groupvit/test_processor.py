"""GroupViT's processor against Transformers' on text and images, and its files both ways."""

import json

import numpy as np
import pytest
import torch
from interloom.models import GroupViTImageProcessor, GroupViTProcessor, GroupViTTokenizer
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

TEXTS = ["A photo of a Cat's   dog!", "Über 12 été, “don't” <|endoftext|> yes", "", "cat of " * 40]


@pytest.fixture(name="folder", scope="module")
def make_folder(tmp_path_factory):
    """CLIP's vocabulary in miniature: every byte and a few merges."""
    folder = tmp_path_factory.mktemp("processor")
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h"), ("o", "f</w>")]
    words = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(name="theirs", scope="module")
def make_theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77
    )


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True, "truncation": True, "max_length": 20},
        {"padding": "max_length", "truncation": True},
        {"padding": "max_length", "max_length": 30, "truncation": True},
        {"padding": "longest"},
    ],
)
def test_text_equals_transformers(folder, theirs, options):
    ours = GroupViTProcessor.from_pretrained(folder)
    found = ours(text=TEXTS, return_tensors="pt", **options)
    expected = theirs(TEXTS, return_tensors="pt", **options)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    assert found.input_ids.dtype == torch.int64
    for row in found["input_ids"]:
        for skip in (True, False):
            assert ours.decode(row, skip_special_tokens=skip) == theirs.decode(row, skip_special_tokens=skip)


def test_text_without_tensors(folder, theirs):
    ours = GroupViTProcessor.from_pretrained(folder)
    assert ours(text="a cat")["input_ids"] == theirs("a cat")["input_ids"]
    assert ours(text=TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    with pytest.raises(ValueError, match="padding=True"):
        ours(text=TEXTS, return_tensors="pt")


def test_images_equal_transformers(folder):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = pil.CLIPImageProcessorPil.from_pretrained(folder)
    ours = GroupViTProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    for resize in (True, False):
        theirs.do_resize = ours.image_processor.do_resize = resize
        images = [
            Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
            for h, w in ((50, 70), (71, 33), (32, 32), (20, 90), (21, 40), (31, 27))
        ]
        images.append(Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8)))
        images.append(Image.fromarray(rng.integers(0, 255, (40, 40, 4), dtype=np.uint8)))
        found = ours(images=images, return_tensors="pt")["pixel_values"]
        expected = theirs(images, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_kinds_of_images_agree(folder):
    ours = GroupViTProcessor.from_pretrained(folder)
    array = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    expected = ours(images=Image.fromarray(array), return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 3, 32, 32)
    for image in (array, array.transpose(2, 0, 1), torch.from_numpy(array), array.astype(np.float32) / 255):
        assert torch.equal(ours(images=image, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(ours(images=[array, array], return_tensors="pt")["pixel_values"][1:], expected)


def test_saved_files_load_here_and_in_transformers(folder, tmp_path):
    ours = GroupViTProcessor.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(text=TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    again = GroupViTProcessor.from_pretrained(tmp_path / "ours")
    found = again(text=TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(found, expected)
    assert again.image_processor == ours.image_processor
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPProcessor.from_pretrained(tmp_path / "ours")
    found = theirs(text=TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(found, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = GroupViTProcessor.from_pretrained(tmp_path / "theirs")
    found = back(text=TEXTS, padding=True, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(found, expected)
    assert back.image_processor.size == {"shortest_edge": 32}


def test_batch_is_a_dictionary_that_moves(folder):
    batch = GroupViTProcessor.from_pretrained(folder)(text=["a"], return_tensors="pt").to("meta")
    assert batch.input_ids.device.type == "meta"
    assert set(batch) == {"input_ids", "attention_mask"}
    with pytest.raises(AttributeError):
        batch.pixel_values  # noqa: B018


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({}, "neither text nor images"),
        ({"text": ["a", 3]}, "text holds a int"),
        ({"text": "a", "padding": "left"}, "padding='left'"),
        ({"text": "a", "return_tensors": "tf"}, "return_tensors='tf'"),
        ({"images": "cat.jpg"}, "cat.jpg cannot be read as an image"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"shape \[8\]|expected \[H, W, 3\]"),
        ({"images": np.zeros((8, 8, 4), np.uint8)}, r"\[8, 8, 4\]"),
        ({"images": np.full((8, 8, 3), np.nan)}, "NaN"),
        ({"images": []}, "empty"),
    ],
)
def test_bad_inputs_are_refused_in_words(folder, kwargs, words):
    with pytest.raises(ValueError, match=words):
        GroupViTProcessor.from_pretrained(folder)(**kwargs)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no preprocessor_config.json"):
        GroupViTProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no tokenizer"):
        GroupViTProcessor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        GroupViTProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        GroupViTProcessor.from_pretrained(tmp_path)


def test_tokenizer_is_called_as_transformers_is(folder, theirs):
    ours = GroupViTProcessor.from_pretrained(folder).tokenizer
    for options in (
        {},
        {"padding": True, "truncation": True, "max_length": 9},
        {"padding": "max_length", "max_length": 95, "return_tensors": "np"},
        {"padding": True, "pad_to_multiple_of": 8, "return_tensors": "pt"},
        {"add_special_tokens": False, "truncation": True, "max_length": 4},
        {"padding": True, "padding_side": "left", "return_attention_mask": False},
    ):
        found, expected = ours(TEXTS, **options), theirs(TEXTS, **options)
        assert set(found) == set(expected)
        for name in expected:
            assert np.array_equal(
                np.asarray(found[name], dtype=object), np.asarray(expected[name], dtype=object)
            )
    caption = "a cat of dogs"
    assert ours(caption)["input_ids"] == theirs(caption)["input_ids"]
    ids = ours.encode(caption)
    assert ids == theirs.encode(caption)
    assert ours.encode(caption, truncation=True, max_length=5) == theirs.encode(
        caption, truncation=True, max_length=5
    )
    assert ours.tokenize(caption) == theirs.tokenize(caption)
    assert ours.decode(ids) == theirs.decode(ids)
    for skip in (True, False):
        assert ours.batch_decode([ids, ids], skip_special_tokens=skip) == theirs.batch_decode(
            [ids, ids], skip_special_tokens=skip
        )
    tokens = ours.convert_ids_to_tokens(ids)
    assert tokens == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_tokens_to_ids(tokens) == ids
    assert ours.convert_tokens_to_ids("cat</w>") == theirs.convert_tokens_to_ids("cat</w>")
    assert ours.convert_tokens_to_ids("nothing like it") == theirs.convert_tokens_to_ids("nothing like it")
    assert len(ours) == len(theirs)


def test_truncation_from_the_left_keeps_both_ends(folder, theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "truncation_side": "left"}))
    transformers = pytest.importorskip("transformers")
    other = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = GroupViTTokenizer.from_pretrained(tmp_path)
    text = "cat dog cat cat dog"
    assert ours.encode(text, truncation=True, max_length=5) == other.encode(
        text, truncation=True, max_length=5
    )
    ours.save_pretrained(tmp_path / "again")
    assert GroupViTTokenizer.from_pretrained(tmp_path / "again").truncation_side == "left"
    with pytest.raises(ValueError, match="max_length=1 leaves no room"):
        ours.encode(text, truncation=True, max_length=1)


@pytest.mark.parametrize(
    "options",
    [
        {"do_center_crop": False, "size": {"height": 24, "width": 40}},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}},
        {"rescale_factor": 1 / 127.5, "data_format": "channels_first"},
        {"size": 20, "crop_size": 18},
    ],
)
def test_image_options_equal_transformers(folder, options):
    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    array = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(array), Image.fromarray(array[:, ::-1].copy())]
    expected = pil.CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt", **options)
    processor = GroupViTProcessor.from_pretrained(folder)
    for found in (
        processor.image_processor(images, return_tensors="pt", **options),
        processor.image_processor.preprocess(images, return_tensors="pt", **options),
        processor(images=images, return_tensors="pt", **options),
        processor(images=images, images_kwargs=options, return_tensors="pt"),
        GroupViTImageProcessor.from_pretrained(folder)(images, return_tensors="pt", **options),
    ):
        torch.testing.assert_close(found.pixel_values, expected.pixel_values.float(), atol=1e-4, rtol=1e-4)


def test_options_reach_their_part_and_unknown_ones_are_named(folder):
    processor = GroupViTProcessor.from_pretrained(folder)
    image = Image.new("RGB", (40, 40), "red")
    mixed = processor(
        text=["a", "a cat"], images=image, padding="max_length", max_length=12, do_normalize=False,
        return_tensors="np",
    )  # fmt: skip
    assert mixed["input_ids"].shape == (2, 12)
    assert mixed["pixel_values"].max() == 1.0
    swapped = processor(image, ["a", "a cat"], padding=True, return_tensors="pt")
    assert set(swapped) == {"input_ids", "attention_mask", "pixel_values"}
    half = swapped.to(torch.bfloat16)
    assert half.input_ids.dtype == half.attention_mask.dtype == torch.int64
    assert half.pixel_values.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no_such_option"):
        processor(text="a", no_such_option=True)
    with pytest.raises(ValueError, match="no_such_setting"):
        GroupViTImageProcessor.from_pretrained(folder, no_such_setting=True)
    assert processor.tokenizer("a", return_tensors="np")["input_ids"].dtype == np.int64
