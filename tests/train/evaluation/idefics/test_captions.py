"""Captions: the data sets' files, words and CIDEr without Java, and whole runs on one and two ranks."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
from interloom.train.cli import main
from interloom.train.evaluation.idefics.annotation_files import PictureFolder
from interloom.train.evaluation.idefics.caption_data import find_captions, read_captions
from interloom.train.evaluation.idefics.cider import cider, require_packages, words

pytest.importorskip("pycocoevalcap")
pytest.importorskip("nltk")

# Captions and what Stanford's tokenizer (CoreNLP 3.4.1, as pycocoevalcap 1.2 calls it in Java) makes of them.
STANFORD = json.loads(Path(__file__).with_name("stanford_words.json").read_text(encoding="utf-8"))
# What docs/evaluation.md says is different.
OTHERWISE = ("<green>", "'n'", "2 1/2", "y'all", "'80s", "?!", "w/", "-running-", "cat's-eye")


def test_words_are_those_of_the_java_tokenizer():
    _, tokenizer = require_packages()
    other = [row["caption"] for row in STANFORD if words(row["caption"], tokenizer) != row["words"]]
    assert len(STANFORD) == 64
    assert len(other) == len(OTHERWISE) == 9
    assert all(any(mark in caption for mark in OTHERWISE) for caption in other)


def test_cider_equals_its_definition():
    said = ["a cat on a mat", "two dogs run", "a red bus"]
    truth = [
        ["a cat sits on a mat", "the cat is on the mat"],
        ["two dogs run fast", "dogs"],
        ["a bus", "a red bus", "the bus is red"],
    ]

    def grams(text, n):
        parts = text.split()
        return Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))

    def one(text, references, n):
        def weights(counts):
            seen = {g: sum(any(g in grams(r, n) for r in refs) for refs in truth) for g in counts}
            return {g: c * (math.log(len(truth)) - math.log(max(1, seen[g]))) for g, c in counts.items()}

        mine, total = weights(grams(text, n)), 0.0
        for reference in references:
            theirs = weights(grams(reference, n))
            shared = sum(min(w, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, w in mine.items())
            norms = [math.sqrt(sum(w * w for w in v.values())) for v in (mine, theirs)]
            difference = sum(grams(text, 2).values()) - sum(grams(reference, 2).values())
            cosine = shared / (norms[0] * norms[1]) if all(norms) else shared
            total += cosine * math.exp(-(difference**2) / (2 * 6.0**2))
        return total / len(references)

    expected = [10 * sum(one(s, r, n) for n in (1, 2, 3, 4)) / 4 for s, r in zip(said, truth, strict=True)]
    mean, each = cider(said, truth)
    assert each == pytest.approx(expected)
    assert mean == pytest.approx(sum(expected) / 3)


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, tmp_path, speller, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    assert main(["eval", "task=caption", f"checkpoint={speller[0]}", f"data={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "install interloom[caption]" in error
    assert len(error.splitlines()) == 1


def karpathy(root, draw):
    """Five pictures to caption and three to show, as Karpathy's files have them."""
    images = []
    for n in range(8):
        name = f"COCO_val2014_{n:012d}.jpg"
        draw(root / "val2014" / name, n)
        sentences = [{"raw": f"a thing of sort {n % 4}."}, {"raw": f"{n} things"}]
        split = "test" if n < 5 else "restval"
        images.append(
            {"filename": name, "filepath": "val2014", "split": split, "sentences": sentences, "cocoid": n}
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return root


def test_files_of_coco_karpathy_and_flickr30k(tmp_path, draw):
    root = karpathy(tmp_path / "k", draw)
    found = find_captions(root, "test", None, None, 0)
    assert found.ids == [0, 1, 2, 3, 4]
    assert found.samples[1].answers == ("a thing of sort 1.", "1 things")
    assert found.samples[1].image.name == "COCO_val2014_000000000001.jpg"
    assert len(find_captions(root, "train", None, None, 0).samples) == 3
    with pytest.raises(ValueError, match="no split 'dev'; it has restval, test"):
        find_captions(root, "dev", None, None, 0)
    coco = {
        "images": [{"id": 3, "file_name": "COCO_val2014_000000000003.jpg"}, {"id": 9, "file_name": "gone.jpg"}],
        "annotations": [
            {"image_id": 3, "caption": "x"}, {"image_id": 9, "caption": "y"}, {"image_id": 3, "caption": "z"},
        ],
    }  # fmt: skip
    (root / "dataset_coco.json").rename(root / "dataset_other.json")
    (root / "captions_val2014.json").write_text(json.dumps(coco))
    found = find_captions(root, "val", None, None, 0)
    assert [sample.answers for sample in found.samples] == [("x", "z"), ("y",)]
    assert [sample.image is None for sample in found.samples] == [False, True]
    lines = root / "results.token"
    lines.write_text("COCO_val2014_000000000001.jpg#0\ta\nCOCO_val2014_000000000001.jpg#1\tb\n")
    assert read_captions(lines, "test", PictureFolder(root)).samples[0].answers == ("a", "b")
    for name, mark in (("captions.txt", ","), ("results.csv", "| ")):
        rows = ((f"COCO_val2014_00000000000{i}.jpg", text) for i, text in ((1, "a"), (1, "b"), (3, "c")))
        (root / name).write_text(f"image{mark}caption\n" + "".join(f"{a}{mark}{b}\n" for a, b in rows))
        found = read_captions(root / name, "test", PictureFolder(root)).samples
        assert [sample.answers for sample in found] == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", {"annotations": []}, "'images' is missing"),
        ("a.json", {"images": [{"id": 1}], "annotations": []}, "'file_name' is missing"),
        ("a.json", {"images": [], "annotations": [{"image_id": 4, "caption": "x"}]}, "image_id 4 is none of"),
        ("a.json", {"images": [], "annotations": []}, "holds no captioned pictures"),
        ("a.json", {"images": [{"split": "test"}]}, "'filename' is missing"),
        (
            "a.json",
            {"images": [{"split": "test", "filename": "1.jpg", "sentences": [{}]}]},
            "'raw' is missing",
        ),
        ("a.token", "1.jpg a caption", "line 1: expected NAME.jpg#0"),
    ],
)
def test_damaged_files_are_named(tmp_path, draw, name, content, words):
    draw(tmp_path / "1.jpg", 1)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.(json|token)") as caught:
        read_captions(tmp_path / name, "test", PictureFolder(tmp_path))
    assert words in str(caught.value)


def test_captions_are_written_and_scored_on_one_and_two_ranks(speller, tmp_path, draw, on_ranks, capsys):
    root = karpathy(tmp_path / "k", draw)
    arguments = [f"checkpoint={speller[0]}", f"data={root}", "task.batch_size=2", "task.max_new_tokens=8"]
    arguments += ["task.shots=2", "task.choice=fixed", "task.num_beams=1"]
    assert main(["eval", "task=caption", *arguments, f"runs_dir={tmp_path / 'one'}"]) == 0
    assert "caption/cider" in capsys.readouterr().out
    assert on_ranks(
        lambda: main(["eval", "task=caption", *arguments, f"runs_dir={tmp_path / 'two'}"]), 2
    ) == [0, 0]
    folders = [tmp_path / name / "eval_caption" / "latest" for name in ("one", "two")]
    scores, captions = (
        [json.loads((folder / name).read_text()) for folder in folders]
        for name in ("metrics.json", "captions.json")
    )
    assert scores[0] == scores[1]
    assert captions[0] == captions[1]
    assert [row["image_id"] for row in captions[0]] == [0, 1, 2, 3, 4]
    truth = [sample.answers for sample in find_captions(root, "test", None, None, 0).samples]
    expected = 100 * cider([row["caption"] for row in captions[0]], truth)[0]
    assert scores[0]["caption/cider"] == pytest.approx(expected)
    assert (scores[0]["caption/images"], scores[0]["caption/skipped"]) == (5, 0)
