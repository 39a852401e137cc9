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
    GenerationConfig,
    GroupViTModel,
    GroupViTProcessor,
    IdeficsConfig,
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
    free = {"eos_token_id": -1, "pad_token_id": 0, "num_beams": 1, "bad_words_ids": []}
    written = model.generate(**batch, max_new_tokens=tokens, **free)
    assert torch.equal(written, expected["generated"])


def test_the_checkpoints_own_generation_settings_are_followed(tmp_path):
    batch, expected = recorded("idefics")
    model = IdeficsForVisionText2Text.from_pretrained(FIXTURES / "idefics")
    told = json.loads((FIXTURES / "idefics" / "generation_config.json").read_text())
    assert model.generation_config.eos_token_id == told["eos_token_id"]
    assert len(told["eos_token_id"]) > 1
    assert torch.equal(model.generate(**batch), expected["generated_as_told"])
    assert torch.equal(model.generate(**batch, num_beams=1), expected["generated_greedy"])
    greedy = GenerationConfig(num_beams=1)
    assert torch.equal(model.generate(**batch, generation_config=greedy), expected["generated_greedy"])
    beams = model.generate(**batch, generation_config={"num_beams": 1}, num_beams=2)
    assert torch.equal(beams, expected["generated_as_told"])
    model.save_pretrained(tmp_path)
    again = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    assert again.generation_config == model.generation_config
    assert again.generation_config.num_beams == 2
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.num_beams) == (told["eos_token_id"], 2)
    assert torch.equal(model.generate(**batch, generation_config=theirs), expected["generated_as_told"])


def test_generation_settings_that_are_not_followed_are_named():
    batch, _ = recorded("idefics")
    model = IdeficsForVisionText2Text.from_pretrained(FIXTURES / "idefics")
    model.generation_config.penalty_alpha = 0.6
    with pytest.raises(ValueError, match=r"penalty_alpha=0\.6"):
        model.generate(**batch)
    assert model.generate(**batch, generation_config={"penalty_alpha": 0.0}).shape[0] == 2


def test_generation_settings_in_the_configuration_of_old_files_count():
    config = IdeficsConfig.from_dict(
        {
            **json.loads((FIXTURES / "idefics" / "config.json").read_text()),
            "max_new_tokens": 3,
            "max_length": 20,
        }
    )
    model = IdeficsForVisionText2Text(config)
    assert model.generate(torch.tensor([[1, 5]]), eos_token_id=-1).shape == (1, 5)
    assert model.generate(torch.tensor([[1, 5]]), eos_token_id=-1, max_length=4).shape == (1, 4)


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
