"""Settings of the tokenizer that are given to a processor or a tokenizer beside a checkpoint's folder."""

from pathlib import Path

import pytest
import transformers
from interloom.models import GroupViTProcessor, IdeficsProcessor, IdeficsTokenizer
from PIL import Image

IDEFICS, GROUPVIT = (
    Path(__file__).parent.parent / "fixtures" / "transformers_437" / name for name in ("idefics", "groupvit")
)
TEXTS = ["a cat", "a dog and another dog in the rain"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_sides_given_to_the_processor_are_transformers(side, tmp_path):
    sides = {"padding_side": side, "truncation_side": side}
    ours = IdeficsProcessor.from_pretrained(IDEFICS, **sides)
    theirs = transformers.AutoTokenizer.from_pretrained(IDEFICS, **sides)
    for options in ({"padding": True}, {"padding": "max_length", "max_length": 40}):
        assert ours.tokenizer(TEXTS, **options)["input_ids"] == theirs(TEXTS, **options)["input_ids"]
    cut = {"truncation": True, "max_length": 4, "add_special_tokens": False}
    assert ours.tokenizer(TEXTS, **cut)["input_ids"] == theirs(TEXTS, **cut)["input_ids"]
    ours.save_pretrained(tmp_path)
    assert IdeficsTokenizer.from_pretrained(tmp_path).truncation_side == side
    assert IdeficsTokenizer.from_pretrained(IDEFICS, **sides).padding_side == side
    captions = GroupViTProcessor.from_pretrained(GROUPVIT, **sides).tokenizer
    assert (captions.padding_side, captions.truncation_side) == (side, side)


def test_max_length_pads_in_the_call_and_as_a_setting(tmp_path):
    processor = IdeficsProcessor.from_pretrained(IDEFICS)
    image = Image.new("RGB", (30, 20))
    prompt = [[TEXTS[0], image]]
    long = processor(prompt, padding="max_length", max_length=50)
    assert long["input_ids"].shape == long["attention_mask"].shape == (1, 50)
    assert long["image_attention_mask"].shape == (1, 50, 1)
    told = IdeficsProcessor.from_pretrained(IDEFICS, padding="max_length", max_length=50)
    assert told(prompt)["input_ids"].equal(long["input_ids"])
    assert told(prompt, padding=True)["input_ids"].shape[1] < 50
    theirs = transformers.AutoTokenizer.from_pretrained(IDEFICS, padding="max_length", max_length=50)
    assert IdeficsProcessor(processor.image_processor, theirs)(prompt)["input_ids"].shape == (1, 50)
    told.save_pretrained(tmp_path)
    assert IdeficsProcessor.from_pretrained(tmp_path)(prompt)["input_ids"].equal(long["input_ids"])
    captions = GroupViTProcessor.from_pretrained(GROUPVIT, padding="max_length", max_length=20)
    assert captions(text=TEXTS, return_tensors="pt")["input_ids"].shape == (2, 20)


def test_settings_that_are_none_are_refused():
    processor = IdeficsProcessor.from_pretrained(IDEFICS)
    with pytest.raises(ValueError, match="padding_sid"):
        IdeficsProcessor.from_pretrained(IDEFICS, padding_sid="left")
    with pytest.raises(ValueError, match="padding_sid"):
        IdeficsTokenizer.from_pretrained(IDEFICS, padding_sid="left")
    with pytest.raises(ValueError, match="beside tokenizer="):
        IdeficsProcessor.from_pretrained(IDEFICS, tokenizer=processor.tokenizer, padding_side="left")
    with pytest.raises(ValueError, match="padding_side='up'"):
        IdeficsProcessor.from_pretrained(IDEFICS, padding_side="up")
    assert processor.chat_template == processor.tokenizer.chat_template
