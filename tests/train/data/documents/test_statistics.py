"""``interloom data stats`` against counting by hand."""

import json
from collections import Counter

import pytest
from interloom.train.cli import main
from interloom.train.data.documents.statistics import scripts_of, spread
from PIL import Image

from .conftest import picture


def test_what_a_folder_holds(tmp_path, tokenizer_folder, capsys):
    texts = ["the red one", "красный мяч", "the red one", "赤い 球"]
    sizes = [(200, 160), (300, 160), (200, 160), (180, 400)]
    (tmp_path / "pictures").mkdir()
    records = []
    for number, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(picture(number % 2 if number < 3 else 9, size))
        images = [f"{number}.jpg", None, f"{number}.jpg", None] if number == 1 else [f"{number}.jpg", None]
        records.append(
            {"images": images, "texts": [None if image else text for image in images], "metadata": None}
        )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "out"
    assert main(["data", "documents", str(tmp_path / "a.jsonl"), str(out), "--tokenizer", str(tokenizer_folder),
                 "--image-root", str(tmp_path / "pictures"), "--no-filters", "--workers", "1"]) == 0  # fmt: skip
    capsys.readouterr()
    drawn = tmp_path / "stats.png"
    assert main(["data", "stats", str(out), "--json", "--out", str(drawn)]) == 0
    figures = json.loads(capsys.readouterr().out)
    stored = json.loads((out / "manifest.json").read_text())["shards"][0]
    assert figures["documents"] == 4
    assert figures["dialogues"] == figures["unreadable"] == 0
    assert (figures["tokens"], figures["images"], figures["bytes"]) == (stored["tokens"], 5, stored["bytes"])
    assert figures["images_per_document"]["histogram"] == {"1": 3, "2": 1}
    assert figures["images_per_document"]["mean"] == 1.25
    assert (figures["width"]["max"], figures["width"]["mean"]) == (300, (200 + 300 + 300 + 200 + 180) / 5)
    assert figures["height"]["max"] == 400
    letters = {"LATIN": 2 * 9, "CYRILLIC": 2 * 10, "HAN": 2, "HIRAGANA": 1}
    assert figures["scripts"] == pytest.approx({k: v / sum(letters.values()) for k, v in letters.items()})
    assert figures["duplicates"] == {
        "documents": 1,
        "images": 2,
    }  # the third is the first; one shows its own twice
    assert Image.open(drawn).size[0] > 500
    assert main(["data", "stats", str(out), "--documents", "2"]) == 0
    shown = capsys.readouterr().out
    assert "Latin" in shown
    assert main(["data", "stats", str(tmp_path / "nowhere")]) == 2
    assert main(["data", "stats", str(out), "--documents", "-1"]) == 2


def test_pairs_are_counted_too(tmp_path, capsys):
    from ....tiny import make_world

    world = make_world(tmp_path)
    assert main(["data", "stats", str(world.shards), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["documents"], figures["images"], figures["tokens"]) == (40, 40, 0)
    assert figures["width"] == figures["height"] == {
        "mean": 24.0, "median": 24.0, "p95": 24.0, "max": 24, "histogram": {"24": 40},
    }  # fmt: skip
    assert figures["scripts"] == {"LATIN": 1.0}


def test_letters_and_spread_by_hand():
    import numpy as np

    assert scripts_of("a1, é ß Ж ע ५ न 漢字 ア 한") == Counter(
        {"LATIN": 3, "CYRILLIC": 1, "HEBREW": 1, "DEVANAGARI": 1, "HAN": 2, "KATAKANA": 1, "HANGUL": 1}
    )
    assert spread(np.array([], np.int64)) == {}
    assert spread(np.array([0, 1, 1, 61]), None)["histogram"] == {0: 3, 60: 1}
