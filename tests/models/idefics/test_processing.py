"""The processor against Transformers'."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.models import IdeficsProcessor
from interloom.models.idefics import IdeficsImageProcessor, image_attention_mask
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics import image_processing_pil_idefics, processing_idefics

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]


def tokenizer(side="left", utterances=True):
    vocabulary = {
        token: index for index, token in enumerate(SPECIAL + [chr(c) for c in range(32, 127)] + ["\n"])
    }
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side=side,
        additional_special_tokens=SPECIAL[3 : 6 if utterances else 5],
    )


class TheirImages(image_processing_pil_idefics.IdeficsImageProcessorPil):
    """Their default needs torchvision; the Pillow one computes the same. Addresses are never fetched here."""


@pytest.fixture(scope="module", params=["left", "right"])
def both(request):
    fast = tokenizer(request.param)
    theirs = processing_idefics.IdeficsProcessor.__new__(processing_idefics.IdeficsProcessor)
    theirs.image_processor, theirs.tokenizer = TheirImages(image_size=28), fast
    # Their constructor checks the image processor's class, which is the torchvision one; the rest of it
    # follows.
    theirs.chat_template = None
    theirs.image_token_id = fast.convert_tokens_to_ids("<image>")
    theirs.default_image_dims = (3, 28, 28)
    theirs.tokenizer_was_trained_with_end_of_utterance_token = True
    return IdeficsProcessor(IdeficsImageProcessor(28), fast, add_end_of_utterance_token=True), theirs


def picture(seed, mode="RGB", size=(40, 31)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def prompts():
    a, b, c = picture(0), picture(1, "RGBA"), picture(2, "L", (9, 60))
    return [
        ["User: ", a, "What is this?", "A dog. ", b, c, "And these?"],
        [c, "short"],
        ["no picture", "at all"],
        ["Literal <image> text", a],
    ]


@pytest.mark.parametrize("eos", [True, False])
def test_ids_masks_and_pixels_equal_transformers(eos, both):
    ours, theirs = both
    mine = ours(prompts(), add_eos_token=eos)
    other = theirs(
        text=prompts(), add_eos_token=eos, add_end_of_utterance_token=True, padding="longest",
        add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "attention_mask", "image_attention_mask"):
        assert torch.equal(mine[name], other[name]), name
    torch.testing.assert_close(mine["pixel_values"], other["pixel_values"], atol=1e-5, rtol=1e-5)


def test_text_alone_equals_transformers(both):
    ours, theirs = both
    mine = ours(text=[["a", "bc"], ["defg"]])
    other = theirs(
        text=[["a", "bc"], ["defg"]], add_end_of_utterance_token=True, padding="longest",
        add_special_tokens=False, return_tensors="pt",
    )  # fmt: skip
    for name in ("input_ids", "attention_mask", "pixel_values", "image_attention_mask"):
        assert torch.equal(mine[name], other[name]), name


def brute_force(ids, image, eos, count, mode, documents=None):
    """Token by token, as documented."""
    mask = torch.zeros(*ids.shape, count, dtype=torch.long)
    for b, row in enumerate(ids.tolist()):
        seen, total, ended, previous = [], 0, False, None
        for t, token in enumerate(row):
            owner = None if documents is None else int(documents[b, t])
            if ended or owner != previous:
                seen, ended = [], False
            previous = owner
            if token == image:
                seen.append(total)
                total += 1
            if owner != -1 and seen and seen[-1] < count:
                mask[b, t, seen if mode == "all_previous" else seen[-1]] = 1
            ended = token == eos
    return mask


@pytest.mark.parametrize("mode", ["latest", "all_previous"])
@pytest.mark.parametrize("packed", [True, False])
def test_image_masks_by_brute_force(mode, packed):
    torch.manual_seed(0)
    ids = torch.randint(0, 6, (40, 20))  # 4 is an image, 2 the end
    documents = torch.randint(0, 2, (40, 20)).cumsum(1) if packed else None
    if documents is not None:
        documents[:, 17:] = -1
    for count in (1, 3, 9):
        actual = image_attention_mask(ids, 4, 2, count, mode, documents)
        assert torch.equal(actual, brute_force(ids, 4, 2, count, mode, documents))


def test_documented_example():
    ids = torch.tensor([[0, 1, 2, 99, 4, 5, 99, 7, 98, 97, 10, 99, 12]])
    mask = image_attention_mask(ids, 99, 98, 3)[0]
    index = torch.where(mask.any(-1), mask.argmax(-1), -1).tolist()
    assert index == [-1, -1, -1, 0, 0, 0, 1, 1, 1, -1, -1, 2, 2]


def test_kinds_of_pictures_and_round_trip(tmp_path, both):
    ours, _ = both
    image = picture(0)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    same = [image, str(tmp_path / "a.png"), tmp_path / "a.png", array, torch.from_numpy(array.copy())]
    batches = [ours([["x", item, "y"]])["pixel_values"] for item in same]
    assert all(torch.equal(batches[0], other) for other in batches[1:])
    ours.save_pretrained(tmp_path / "saved")
    back = IdeficsProcessor.from_pretrained(tmp_path / "saved")
    back.add_end_of_utterance_token = True
    for name, value in ours(prompts()).items():
        assert torch.equal(back(prompts())[name], value)
    assert back.tokenizer.padding_side == ours.tokenizer.padding_side
    ids = ours([["hello", image]])["input_ids"]
    assert ours.batch_decode(ids, skip_special_tokens=True) == ["hello"]


def test_images_beside_texts_and_options(both):
    ours, _ = both
    image = picture(0)
    nested = ours(images=[[image, image], [image]], text=["one", "two"])
    assert torch.equal(nested["input_ids"], ours([["one", image, image], ["two", image]])["input_ids"])
    flat = ours(images=[image, image], text=["one", "two"])
    assert torch.equal(flat["input_ids"], ours([[image, "one"], [image, "two"]])["input_ids"])
    single = ours(["one", image])
    assert torch.equal(single["input_ids"], ours([["one", image]])["input_ids"])
    cut = ours([["a long text", image]], truncation=True, max_length=6)
    assert cut["input_ids"].shape == (1, 6)
    assert not cut["pixel_values"].any()  # its token was cut off
    padded = ours([["ab"]], padding="max_length", max_length=9, padding_side="right")
    assert padded["attention_mask"].tolist() == [[1, 1, 1] + [0] * 6]
    scaled = ours([["x", image]], transform=lambda p: torch.full((3, 28, 28), 5.0))
    assert (scaled["pixel_values"] == 5).all()
    both_seen = ours([["x", image, image, "y"]], image_attention="all_previous")["image_attention_mask"]
    assert both_seen[0, -1].tolist() == [1, 1]


def test_addresses_need_a_fetcher(both):
    ours, _ = both
    with pytest.raises(ValueError, match="fetches nothing"):
        ours([["look", "https://example.com/a.png"]])
    asked = []
    fetching = IdeficsProcessor(
        IdeficsImageProcessor(28), tokenizer(), fetch=lambda url: asked.append(url) or picture(0)
    )
    fetching([["look", "https://example.com/a.png"]])
    assert asked == ["https://example.com/a.png"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(), "nothing"),
        (lambda p: p([[]]), "empty"),
        (lambda p: p([["x", 3]]), "holds a int"),
        (lambda p: p([["x"], ["xyz"]], padding=False), "padding=True"),
        (lambda p: p([["x"]], padding="most"), "padding='most'"),
        (lambda p: p([["x"]], padding_side="top"), "padding_side"),
        (lambda p: p([["x"]], padding="max_length"), "max_length"),
        (lambda p: p([["x", picture(0)]], image_attention="next"), "image_attention"),
        (lambda p: p(images=[picture(0)], text=["a", "b"]), "2 texts came with 1"),
        (lambda p: p([["x"]], return_tensors="tf"), "return_tensors"),
        (lambda p: p([["x", np.zeros((4, 4))]]), "shape"),
        (
            lambda p: p([["x", picture(0), picture(1)]], transform=lambda i: torch.zeros(3, i.width, 1 +
                len(mixed.append(0) or mixed))),
            "mixed sizes",
        ),
    ],
)  # fmt: skip
def test_bad_prompts(call, message, both):
    with pytest.raises(ValueError, match=message):
        call(both[0])


mixed: list[int] = []


def test_files_that_are_no_pictures(tmp_path, both):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        both[0]([["x", tmp_path / "a.png"]])
    with pytest.raises(ValueError, match="no preprocessor_config"):
        IdeficsProcessor.from_pretrained(tmp_path)


STEPS = [
    {"do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127},
    {"image_size": 20, "do_rescale": False, "do_normalize": False},
    {"do_resize": False},
]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "-".join(steps))
def test_steps_left_out_are_those_of_transformers(steps, tmp_path):
    """In the call, in the object and in the file, whose settings are never dropped."""
    shown = [picture(3, size=(24, 24))]
    theirs = TheirImages(**steps)
    expected = theirs(shown, return_tensors="pt").float()
    theirs.save_pretrained(tmp_path)
    for ours in (
        IdeficsImageProcessor().changed(steps),
        IdeficsImageProcessor(**steps),
        IdeficsImageProcessor.from_pretrained(tmp_path),
    ):
        torch.testing.assert_close(ours(shown), expected, atol=2e-3, rtol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    again = TheirImages.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(shown, return_tensors="pt").float(), expected, atol=1e-4, rtol=1e-4)


def test_settings_by_group_and_by_name(tmp_path):
    processor = IdeficsProcessor(IdeficsImageProcessor(28), tokenizer())
    prompt = ["User:", picture(0), "What is this?"]
    plain = processor(prompt, padding="max_length", max_length=24, do_normalize=False)
    grouped = processor(
        prompt,
        text_kwargs={"padding": "max_length", "max_length": 24},
        images_kwargs={"do_normalize": False},
        common_kwargs={"return_tensors": "pt"},
    )
    for name, value in plain.items():
        assert torch.equal(value, grouped[name])
    assert float(plain["pixel_values"].min()) >= 0
    assert float(processor(prompt)["pixel_values"].min()) < 0
    with pytest.raises(ValueError, match="max_length is given in text_kwargs and beside it"):
        processor(prompt, max_length=8, text_kwargs={"max_length": 9})
    with pytest.raises(ValueError, match="does not know colour"):
        processor(prompt, colour=True)
    files = processor.save_pretrained(tmp_path)
    assert json.loads(Path(files[0]).read_text())["image_size"] == 28
    read = IdeficsProcessor.from_pretrained(tmp_path, do_rescale=False)
    assert not read.image_processor.do_rescale
    assert json.loads(read.to_json_string())["image_processor"]["image_size"] == 28
    own = IdeficsImageProcessor(14, return_tensors="np")
    assert IdeficsProcessor.from_pretrained(tmp_path, image_processor=own).image_processor.image_size == 14
    assert isinstance(own(picture(0)), np.ndarray)


@pytest.mark.parametrize("bad", [{"rescale_factor": "a third"}, {"do_resize": "perhaps"}])
def test_steps_that_are_none_of_their_kind_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        IdeficsImageProcessor.from_dict(bad)
