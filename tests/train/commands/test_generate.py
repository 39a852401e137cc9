"""``interloom generate`` on a small checkpoint."""

import json

import pytest
import torch
from interloom.models import (
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsPerceiverConfig,
    IdeficsProcessor,
    IdeficsVisionConfig,
)
from interloom.models.idefics import IdeficsImageProcessor, IdeficsTokenizer
from interloom.train.cli import main
from interloom.train.commands.generate import interleave
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]


def make_checkpoint(folder):
    vocabulary = {token: i for i, token in enumerate(SPECIAL + [chr(c) for c in range(32, 127)])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    processor = IdeficsProcessor(IdeficsImageProcessor(28), IdeficsTokenizer(backend))
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(
        IdeficsConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            alpha_initializer="ones",
            initializer_range=0.5,
            use_resampler=True,
            vision_config=IdeficsVisionConfig(
                embed_dim=16, image_size=28, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
            ),
            perceiver_config=IdeficsPerceiverConfig(
                resampler_n_latents=3, resampler_depth=1, resampler_n_heads=2, resampler_head_dim=8
            ),
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.eval(), processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idefics")
    model, processor = make_checkpoint(folder)
    Image.new("RGB", (50, 40), (200, 30, 60)).save(folder / "red.png")
    return folder, model, processor


def test_text_and_images_are_continued(checkpoint, capsys):
    folder, model, processor = checkpoint
    red = folder / "red.png"
    arguments = ["--image", str(red), "--checkpoint", str(folder), "--max-new-tokens", "8"]
    assert main(["generate", "--prompt", "What <image> is it?", *arguments]) == 0
    streamed = capsys.readouterr().out
    inputs = processor([["What ", red, " is it?"]])
    ids = model.generate(**inputs, max_new_tokens=8, bad_words_ids=[[3], [4]])
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert streamed == expected + "\n"
    assert main(["generate", "--prompt", "What <image> is it?", "--json", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected


def test_draws_follow_the_seed_and_beams_work(checkpoint, capsys):
    folder, _, _ = checkpoint
    base = ["generate", "--prompt", "once", "--checkpoint", str(folder), "--json", "--max-new-tokens", "6"]
    texts = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        assert main([*base, "--temperature", "1.5", *extra]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]
    assert main([*base, "--num-beams", "2", "--dtype", "bfloat16"]) == 0


def test_order_of_texts_and_images(tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for path in (a, b):
        path.touch()
    assert interleave("x <image> y<image>", [str(a), str(b)]) == ["x ", a, " y", b]
    assert interleave("describe", [str(a)]) == [a, "describe"]
    assert interleave("", ["https://example.com/c.png"]) == ["https://example.com/c.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "Nothing to continue"),
        (["--prompt", "<image> x"], "1 <image> but 0"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png does not exist"),
        (["--prompt", "x", "--image", "http://127.0.0.1/a.png"], "could not be fetched"),
        (["--prompt", "x", "--dtype", "int3"], "int3"),
        (["--prompt", "x", "--top-p", "3"], "top_p"),
    ],
)
def test_mistakes_are_one_line(arguments, message, checkpoint, capsys):
    assert main(["generate", "--checkpoint", str(checkpoint[0]), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
