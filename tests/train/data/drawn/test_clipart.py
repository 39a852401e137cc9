"""Clip art: pairs from names, collages whose masks are the drawings' own alpha channels."""

import io
import re

import numpy as np
import pytest
from interloom.train.data.drawn.clipart import caption_from_path, write_clipart
from interloom.train.data.shards.reader import ShardReader, ShardSet
from PIL import Image, ImageDraw


def drawing(path, colour, size=(60, 80)):
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((5, 5, size[0] - 6, size[1] - 6), fill=(*colour, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("clipart")
    for n in range(200):
        drawing(root / "in" / "red_things" / f"apple_{n:03d}_author.png", (250, 0, 0))
        drawing(root / "in" / "blue" / "birds" / f"jay_{n:03d}.png", (0, 0, 250))
        drawing(root / "in" / "unsorted" / f"x_{n:03d}.png", (0, 250, 0))
    return root / "out", write_clipart(root / "out", root / "in", collages=10)


def records(folder):
    shards = ShardSet.open([str(folder)])
    reader = ShardReader(shards)
    return [reader.read(sample) for sample in range(len(shards))]


def test_collages_hold_two_categories_and_their_masks(built):
    out, counts = built
    assert counts["train"] + counts["val"] == 600
    assert counts["val"] > 40
    assert (out / "collages" / "classes.txt").read_text() == "blue\nred things\n"
    for record in records(out / "collages"):
        image = np.asarray(Image.open(io.BytesIO(record.members["png"])), np.int64)
        mask = np.asarray(Image.open(io.BytesIO(record.members["mask.png"])))
        assert set(np.unique(mask)) == {0, 1, 2}
        assert image[mask == 1].mean(0)[2] > 200 > 60 > image[mask == 1].mean(0)[0]
        assert image[mask == 2].mean(0)[0] > 200 > 60 > image[mask == 2].mean(0)[2]
        assert (image[mask == 0].mean(0) > 240).all()


def test_training_sees_no_mask_and_captions_come_from_names(built):
    out, _ = built
    seen = set()
    for record in records(out / "train"):
        assert set(record.members) <= {"png", "jpg", "txt", "json"}
        seen.add(re.sub(r"\W+", " ", record.text("txt")).strip())
    assert "apple author red things" in seen
    assert caption_from_path("blue/birds/jay_007.png") == "jay, birds, blue"


def test_tokenizer_is_one_that_the_model_reads(built):
    from interloom.models.groupvit import GroupViTTokenizer

    tokenizer = GroupViTTokenizer.from_pretrained(built[0] / "tokenizer")
    assert tokenizer.eos_token_id == 3
    assert tokenizer.vocab_size <= 2048


def test_a_missing_folder_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError, match="openclipart-png"):
        write_clipart(tmp_path / "out", tmp_path / "nothing")
    assert not (tmp_path / "out").exists()
