"""Drawn scenes: what a caption says is what the picture and its mask show, and the same seed draws the same."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from interloom.models.groupvit import GroupViTProcessor
from interloom.models.groupvit.templates import IMAGENET_TEMPLATES
from interloom.train.commands import data_drawn
from interloom.train.data.drawn import pairs as demo
from interloom.train.data.drawn.backdrops import BACKDROP_NAMES
from interloom.train.data.drawn.objects import CLASS_NAMES, COLOUR_NAMES, KINDS, draw_object
from interloom.train.data.drawn.scenes import MAX_OBJECTS, draw_scene
from interloom.train.data.shards.reader import ShardReader, ShardSet

SCENES = [draw_scene(3, index) for index in range(60)]


def test_a_scene_depends_on_seed_and_index_alone():
    again = draw_scene(3, 17)
    assert np.array_equal(again.image, SCENES[17].image)
    assert np.array_equal(again.mask, SCENES[17].mask)
    assert again.caption == SCENES[17].caption
    assert len({scene.image.tobytes() for scene in SCENES}) == len(SCENES)
    assert not np.array_equal(draw_scene(4, 17).image, SCENES[17].image)


def test_captions_name_what_the_mask_shows():
    counts = set()
    for scene in SCENES:
        *kinds, backdrop = scene.nouns
        assert backdrop in BACKDROP_NAMES
        shown = {CLASS_NAMES[i - 1] for i in np.unique(scene.mask) if i > 0}
        assert shown == set(kinds)
        words = scene.caption.replace(",", "").split()
        assert [word for word in words if word in CLASS_NAMES] == kinds
        assert backdrop in words
        counts.add(len(kinds))
    assert counts == set(range(1, MAX_OBJECTS + 1))


def test_every_class_and_backdrop_comes_up_and_eight_classes_are_there():
    nouns = {noun for scene in SCENES for noun in scene.nouns}
    assert nouns == {*CLASS_NAMES, *BACKDROP_NAMES}
    assert len(CLASS_NAMES) >= 8


def test_images_and_masks_have_their_types_and_sizes():
    scene = draw_scene(0, 1, 96)
    assert scene.image.shape == (96, 96, 3)
    assert scene.image.dtype == np.uint8
    assert scene.mask.shape == (96, 96)
    assert scene.mask.dtype == np.uint8


@pytest.mark.parametrize("index", range(8))
def test_another_size_keeps_the_composition(index):
    small, large = draw_scene(5, index, 64), draw_scene(5, index, 128)
    assert small.caption == large.caption
    assert (small.mask == large.mask[::2, ::2]).mean() > 0.95


def test_the_mask_is_the_silhouette():
    """Outside the mask a scene is its backdrop: two scenes that differ in objects alone agree there."""
    scene = SCENES[0]
    edges = scene.mask != 0
    assert 0.02 < edges.mean() < 0.7
    tile = np.asarray(draw_object(1, "red", 64, np.random.default_rng(0)))
    inside = tile[..., 3] > 0
    assert 0.3 < inside.mean() < 0.9
    assert not tile[0, 0, 3]


def test_colours_are_those_of_the_kind():
    for scene in SCENES:
        words = scene.caption.replace(",", "").split()
        for before, word in pairwise(words):
            if word in CLASS_NAMES and before in COLOUR_NAMES:
                assert before in KINDS[CLASS_NAMES.index(word)].colours


@pytest.mark.parametrize(("seed", "index", "size"), [(0, 0, 8), (-1, 0, 64), (0, -1, 64)])
def test_bad_arguments_are_refused(seed, index, size):
    with pytest.raises(ValueError, match=r"size is|seed is"):
        draw_scene(seed, index, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "demo"
    demo.write_demo(out, train=6, val=3, seed=1)
    return out


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_demo_is_ordinary_shards_and_training_has_no_masks(folder):
    for split, count, first in (("train", 6, 0), ("val", 3, demo.VAL_START)):
        shards = ShardSet.open([str(folder / split)], kind="pairs")
        reader = ShardReader(shards)
        assert len(shards) == count
        for i in range(count):
            record = reader.read(i)
            scene = draw_scene(1, first + i, demo.VAL_SIZE if split == "val" else demo.TRAIN_SIZE)
            assert record.text("txt") == scene.caption
            assert record.json() == {"nouns": scene.nouns}
            assert ("mask.png" in record.members) == (split == "val")
    assert (folder / "classes.txt").read_text().split() == list(CLASS_NAMES)
    assert (folder / "backdrops.txt").read_text().split() == list(BACKDROP_NAMES)


def test_the_same_demo_has_the_same_bytes_and_is_completed(folder, tmp_path):
    wanted = digests(folder)
    again = tmp_path / "again"
    demo.write_demo(again, train=6, val=3, seed=1)
    assert digests(again) == wanted
    next((again / "train").glob("*.idx")).unlink()
    demo.write_demo(again, train=6, val=3, seed=1)
    assert digests(again) == wanted


def test_a_folder_of_another_demo_is_left_alone(folder, tmp_path):
    with pytest.raises(ValueError, match="choose another folder"):
        demo.write_demo(folder, train=7, val=3, seed=1)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="choose another folder"):
        demo.write_demo(tmp_path, train=1, val=0)
    with pytest.raises(ValueError, match="expected pairs or interleaved"):
        data_drawn.demo(tmp_path / "new", kind="pictures")
    with pytest.raises(ValueError, match="train=0"):
        demo.write_demo(tmp_path / "new", train=0)


def test_the_tokenizer_knows_every_word(folder):
    processor = GroupViTProcessor.from_pretrained(folder / "tokenizer")
    texts = [scene.caption for scene in SCENES]
    texts += [template.format(name) for template in IMAGENET_TEMPLATES for name in CLASS_NAMES]
    rows = processor(text=texts, padding=True, return_tensors="pt")["input_ids"]
    settings = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    end = vocabulary["<|endoftext|>"]
    assert not (rows == vocabulary["<|unknown|>"]).any()
    assert (rows == end).sum(1).tolist() == [1] * len(texts)
    assert end == max(vocabulary.values()) == processor.tokenizer.vocab_size - 1
    pixels = processor(images=[SCENES[0].image], return_tensors="pt")["pixel_values"]
    assert list(pixels.shape) == [1, 3, demo.TRAIN_SIZE, demo.TRAIN_SIZE]
