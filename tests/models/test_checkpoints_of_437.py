"""Checkpoints written by Transformers 4.37.2, as published ones are, give the outputs it gave.

``fixtures/transformers_437/make.py`` writes both.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.models import (
    GroupViTModel,
    GroupViTProcessor,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
)

FIXTURES = Path(__file__).parent.parent / "fixtures" / "transformers_437"
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")


def recorded(name):
    values = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / name / "outputs.npz").items()}
    return {k: v for k, v in values.items() if k in INPUTS}, values


@pytest.mark.parametrize("name", ["idefics", "idefics_oldest"])
def test_idefics(name):
    batch, expected = recorded(name)
    model = IdeficsForVisionText2Text.from_pretrained(FIXTURES / name)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    if "loss" in expected:
        loss = model(**batch, labels=batch["input_ids"]).loss
        torch.testing.assert_close(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    tokens = expected["generated"].shape[1] - batch["input_ids"].shape[1]
    free = {"eos_token_id": -1, "pad_token_id": 0, "num_beams": 1, "bad_words_ids": [], "length_penalty": 1.0}
    written = model.generate(**batch, max_new_tokens=tokens, **free)
    assert torch.equal(written, expected["generated"])


def test_groupvit():
    batch, expected = recorded("groupvit")
    out = GroupViTModel.from_pretrained(FIXTURES / "groupvit")(**batch, return_loss=True)
    for name in ("loss", "logits_per_image", "text_embeds", "image_embeds"):
        torch.testing.assert_close(out[name], expected[name].reshape(out[name].shape), atol=1e-4, rtol=1e-5)
    processor = GroupViTProcessor.from_pretrained(FIXTURES / "groupvit")
    assert processor.image_processor.image_mean == (0.5, 0.5, 0.5)
    assert processor.image_processor.resample == 2


def test_processor_of_idefics():
    _, expected = recorded("idefics")
    processor = IdeficsProcessor.from_pretrained(FIXTURES / "idefics")
    images = processor.image_processor
    assert (images.image_size, tuple(images.image_mean)) == (28, (0.5, 0.4, 0.3))
    ids = processor.tokenizer.encode(["the cat sees a dog."], add_special_tokens=True)[0]
    assert ids == expected["text_ids"].tolist()


def test_a_sentencepiece_file_alone_says_what_to_do():
    with pytest.raises(ValueError, match=r"tokenizer\.model.*AutoTokenizer.*save_pretrained"):
        IdeficsProcessor.from_pretrained(FIXTURES / "idefics_oldest")


def test_old_files_convert_to_ones_that_the_newest_release_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, model in (("idefics", IdeficsForVisionText2Text), ("groupvit", GroupViTModel)):
        batch, expected = recorded(name)
        model.from_pretrained(FIXTURES / name).save_pretrained(tmp_path / name)
        theirs = getattr(transformers, model.__name__).from_pretrained(tmp_path / name).eval()
        key = "logits" if name == "idefics" else "logits_per_image"
        torch.testing.assert_close(theirs(**batch)[key], expected[key], atol=1e-4, rtol=1e-4)


def test_no_other_architecture_loads(tmp_path):
    shutil.copytree(FIXTURES / "idefics", tmp_path / "idefics")
    path = tmp_path / "idefics" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_key_value_heads": 1}))
    with pytest.raises(ValueError, match="num_key_value_heads"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path / "idefics")
