"""Sources of pairs to shards, through the command line where people use it."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from interloom.train.cli import main
from interloom.train.data.pairs import build
from interloom.train.data.pairs.dataset import read_pair
from interloom.train.data.pairs.nouns import NltkFinder, WordlistFinder, nouns_from_value
from interloom.train.data.pairs.sources import FolderSource, caption_from_path, open_source
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.data.shards.verify import verify_folder
from PIL import Image


def picture(i: int, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (24 + i, 20), (9 * i % 256, 100, 50)).save(out, form)
    return out.getvalue()


def read_all(folder) -> list[tuple[bytes, str, dict]]:
    reader = ShardReader(ShardSet.open(folder))
    found = []
    for i in range(len(reader.shards)):
        record = reader.read(i)
        image = next(bytes(data) for e, data in record.members.items() if e in ("jpg", "png", "webp"))
        found.append((image, record.text("txt"), record.json()))
    return found


@pytest.fixture
def folder(tmp_path):
    """Ten pictures with captions beside them, two of them unusable."""
    root = tmp_path / "pictures"
    (root / "birds").mkdir(parents=True)
    for i in range(10):
        (root / "birds" / f"{i}.jpg").write_bytes(picture(i))
        (root / "birds" / f"{i}.txt").write_text(f"a red  parrot\nnumber {i}")
    (root / "birds" / "3.txt").write_text("  ")
    (root / "birds" / "7.jpg").write_bytes(picture(7)[:-8])
    return root


def test_folder_with_captions_beside(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["data", "pairs", str(folder), str(out), "--samples-per-shard", "4", "--max-skip-rate", "0.5"]
    assert main([*arguments, "--workers", "1"]) == 0
    assert "8 pairs of 10 rows" in capsys.readouterr().out
    good = [i for i in range(10) if i not in (3, 7)]
    assert [(image, text) for image, text, _ in read_all(out)] == [
        (picture(i), f"a red parrot number {i}") for i in good
    ]
    report = json.loads((out / "report.json").read_text())
    assert report["seen"] == 10
    assert {reason: entry["count"] for reason, entry in report["reasons"].items()} == {
        "empty caption": 1,
        "broken image": 1,
    }
    assert report["reasons"]["empty caption"]["names"] == ["birds/3.jpg"]
    assert main(["data", "verify", str(out)]) == 0
    assert main([*arguments, "--workers", "1"]) == 0  # nothing is left to do
    assert main([*arguments[:-2], "--workers", "1"]) == 2  # nor is what was lost forgotten
    assert "2 of 10 samples were skipped" in capsys.readouterr().err
    assert main([*arguments, "--max-side", "16", "--workers", "1"]) == 2
    assert "other options" in capsys.readouterr().err


def test_too_many_losses_stop_the_build(folder, tmp_path, capsys):
    assert main(["data", "pairs", str(folder), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "2 of 10 samples were skipped, more than the allowed share of 0.1" in capsys.readouterr().err


def test_an_interrupted_build_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch):
    options = build.BuildOptions(samples_per_shard=3)
    whole = build.build_shards(FolderSource(folder), tmp_path / "whole", options, max_skip_rate=1, workers=2)
    calls = []

    class Killed(Exception):
        pass

    class Tracked(FolderSource):
        def rows(self, start, stop):
            for row, pair in enumerate(super().rows(start, stop), start):
                if row == self.kill:
                    raise Killed
                calls.append(row)
                yield pair

    source = Tracked(folder)
    source.kill = 7
    with pytest.raises(Killed):
        build.build_shards(source, tmp_path / "out", options, max_skip_rate=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000000.idx", "000000.tar", "000001.idx", "000001.tar",
    ]  # fmt: skip
    calls.clear()
    source.kill = None
    report = build.build_shards(source, tmp_path / "out", options, max_skip_rate=1)
    assert calls == [6, 7, 8, 9]
    assert report.to_dict() == whole.to_dict()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_names_are_captions_and_the_rest_is_held_out(tmp_path, capsys):
    assert caption_from_path("animals/birds/red_parrot-2_01.png") == "red parrot, birds, animals"
    for i in range(40):
        path = tmp_path / "clips" / "birds" / f"red_parrot_{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, "PNG"))
    (tmp_path / "words.txt").write_text("# birds\nparrot\nred\nbird\n")
    arguments = [
        "--captions",
        "names",
        "--holdout",
        "0.25",
        "--nouns",
        "wordlist",
        "--words",
        str(tmp_path / "words.txt"),
    ]
    assert (
        main(["data", "pairs", str(tmp_path / "clips"), str(tmp_path / "out"), "--workers", "1", *arguments])
        == 0
    )
    train, val = read_all(tmp_path / "out" / "train"), read_all(tmp_path / "out" / "val")
    assert {image for image, _, _ in train} | {image for image, _, _ in val} == {
        picture(i, "PNG") for i in range(40)
    }
    assert len(train) + len(val) == 40
    assert 3 <= len(val) <= 17
    assert train[0][1] == "red parrot, birds"
    assert train[0][2]["nouns"] == ["red", "parrot", "bird"]


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "parquet bytes"])
def test_tables(tmp_path, form):
    import pyarrow as pa
    from pyarrow import parquet

    rows = []
    for i in range(7):
        (tmp_path / f"p{i}.jpg").write_bytes(picture(i))
        rows.append({"file_name": f"p{i}.jpg", "title": f'row {i}, "quoted"', "nouns": "cat, dog;cat"})
    rows[2]["file_name"] = "missing.jpg"
    rows[4]["file_name"] = "https://example.com/a.jpg"
    path = tmp_path / f"table.{form.split()[0]}"
    if form in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        if form == "parquet bytes":
            for i, row in enumerate(rows):
                row["image"] = {
                    "bytes": picture(i) if i not in (2, 4) else None,
                    "path": row.pop("file_name"),
                }
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    command = [
        "data",
        "pairs",
        str(path),
        str(tmp_path / "out"),
        "--nouns",
        "column",
        "--max-skip-rate",
        "0.5",
    ]
    assert main([*command, "--samples-per-shard", "3", "--workers", "1"]) == 0
    assert read_all(tmp_path / "out") == [
        (picture(i), f'row {i}, "quoted"', {"nouns": ["cat", "dog"], "source": described["source"]})
        for i, (_, _, described) in zip([0, 1, 3, 5, 6], read_all(tmp_path / "out"), strict=True)
    ]
    reasons = json.loads((tmp_path / "out" / "report.json").read_text())["reasons"]
    assert set(reasons) == {"unreadable file", "image is a URL"}


def test_saved_data_sets(tmp_path):
    import datasets

    images = [Image.open(io.BytesIO(picture(i, "PNG"))) for i in range(5)]
    data = datasets.Dataset.from_dict({"image": images, "text": [f"row {i}" for i in range(5)]})
    data = data.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    assert main(["data", "pairs", str(tmp_path / "saved"), str(tmp_path / "out"), "--workers", "1"]) == 0
    found = read_all(tmp_path / "out")
    assert [text for _, text, _ in found] == [f"row {i}" for i in range(5)]
    for i, (image, _, _) in enumerate(found):
        assert np.array_equal(Image.open(io.BytesIO(image)), images[i])


def foreign_tar(path, count=6):
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            for name, data in ((f"{i}.jpg", picture(i)), (f"{i}.txt", b"caption"), (f"{i}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_existing_tars_are_indexed_in_place(tmp_path, capsys):
    for i in range(3):
        foreign_tar(tmp_path / f"{i}.tar")
    before = (tmp_path / "1.tar").read_bytes()
    assert main(["data", "pairs", str(tmp_path), str(tmp_path), "--index-only", "--workers", "1"]) == 0
    assert "18 × extension not allowed" in capsys.readouterr().out
    assert (tmp_path / "1.tar").read_bytes() == before
    assert [image for image, _, _ in (pair(r) for r in all_records(tmp_path))] == [
        picture(i) for i in range(6)
    ] * 3
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert main(["data", "pairs", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "--index-only" in capsys.readouterr().err


def test_indexing_can_find_nouns_and_leaves_out_empty_captions(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("caption\n")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, caption in enumerate([b"a caption", b" ", b"captions, many", b"nothing"]):
            for name, data in (
                (f"{i}.jpg", picture(i)),
                (f"{i}.txt", caption),
                (f"{i}.json", b'{"nouns": ["x"]}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    command = ["data", "pairs", str(tmp_path), "--index-only", "--workers", "1"]
    assert main([*command, "--nouns", "wordlist", "--words", str(tmp_path / "words.txt")]) == 0
    assert "1 × empty caption: a.tar/1" in capsys.readouterr().out
    assert [read_pair(record).nouns for record in all_records(tmp_path)] == [["caption"], ["caption"], []]
    assert main(command) == 0
    assert [read_pair(record).nouns for record in all_records(tmp_path)] == [["x"]] * 3


def all_records(folder):
    reader = ShardReader(ShardSet.open(folder))
    return [reader.read(i) for i in range(len(reader.shards))]


def pair(record):
    return bytes(record.members["jpg"]), record.text("txt"), record.json()


def test_verify_lists_everything_that_is_not_whole(tmp_path, capsys):
    for i in range(9):
        foreign_tar(tmp_path / f"{i}.tar")
    build.index_shards(tmp_path)
    assert verify_folder(tmp_path) == []

    def damage(name, change):
        data = bytearray((tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(bytes(change(data) or data))

    damage("0.tar", lambda data: data[:3000])
    damage("1.tar", lambda data: data.__setitem__(600, data[600] ^ 1))
    (tmp_path / "2.idx").unlink()
    (tmp_path / "3.tar").unlink()
    damage("4.idx", lambda data: data.__setitem__(len(data) - 5, data[-5] ^ 1))
    (tmp_path / "5.idx").write_bytes((tmp_path / "6.idx").read_bytes())
    foreign_tar(tmp_path / "7.tar", count=5)
    problems = "\n".join(verify_folder(tmp_path))
    for expected in (
        r"0.tar: 3000 bytes, its index says",
        r"0.tar: samples unreadable: 5 × truncated shard",
        r"1.tar: sha256 differs",
        r"1.tar: samples unreadable: 1 × checksum differs: 1.tar/0 (.jpg)",
        r"2.tar: has no index",
        r"3.idx: its tar is missing",
        r"3.tar: missing, with 6 samples",
        r"is damaged: column",
        r"5.tar: its index is that of 6.tar",
        r"7.tar: ",
    ):
        assert expected in problems
    assert "6.tar: " not in problems.replace("that of 6.tar", "")
    assert "8.tar: " not in problems
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "problems in" in capsys.readouterr().out


def test_verify_remembers_what_indexing_could_not_read(tmp_path):
    foreign_tar(tmp_path / "0.tar")
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:5000])
    build.index_shards(tmp_path)
    assert any("truncated tar when it was indexed" in problem for problem in verify_folder(tmp_path))


def test_large_pictures_are_scaled_down(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (200, 100), "red").save(tmp_path / "in" / "opaque.jpg")
    Image.new("RGBA", (100, 200), (0, 0, 255, 90)).save(tmp_path / "in" / "clear.png")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "in" / "small.webp", lossless=True)
    small = (tmp_path / "in" / "small.webp").read_bytes()
    build.build_shards(
        open_source(str(tmp_path / "in"), captions="names"), tmp_path / "out", build.BuildOptions(max_side=64)
    )
    images = {text: Image.open(io.BytesIO(image)) for image, text, _ in read_all(tmp_path / "out")}
    assert {text: (image.format, image.mode, image.size) for text, image in images.items()} == {
        "opaque": ("JPEG", "RGB", (64, 32)),
        "clear": ("PNG", "RGBA", (32, 64)),
        "small": ("WEBP", "RGB", (40, 30)),
    }
    assert small in [image for image, _, _ in read_all(tmp_path / "out")]


def test_nouns():
    find = WordlistFinder(["traffic light", "light", "Dog", "box"])
    assert find("Two dogs under TRAFFIC  lights, a light and boxes; doghouse") == [
        "Dog",
        "traffic light",
        "light",
        "box",
    ]
    assert nouns_from_value(["a", " b ", None, "a"]) == ["a", "b"]
    assert nouns_from_value(None) == []


def test_nltk_without_its_data_says_what_to_do(monkeypatch):
    nltk = pytest.importorskip("nltk")

    def missing(text):
        raise LookupError("Resource punkt_tab not found.")

    monkeypatch.setattr(nltk, "word_tokenize", missing)
    with pytest.raises(ValueError, match=r"nltk\.downloader punkt_tab"):
        NltkFinder()


def test_nltk_takes_nouns_and_verbs(monkeypatch):
    nltk = pytest.importorskip("nltk")
    tags = {
        "a": "DT",
        "dog": "NN",
        "barks": "VBZ",
        "at": "IN",
        "Paris": "NNP",
        "loud": "JJ",
        "cats": "NNS",
        "cat": "NN",
    }
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, tags[word]) for word in words])
    assert NltkFinder()("a loud dog barks at cats at Paris dog") == ["dog", "barks", "cats", "Paris"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "no source at nowhere"),
        (["{folder}"], "OUT is missing"),
        (["{folder}", "out", "--captions", "guess"], "expected auto, sidecar or names"),
        (["{folder}", "out", "--nouns", "magic"], "expected column, wordlist or nltk"),
        (["{folder}", "out", "--nouns", "wordlist"], "needs --words FILE"),
        (["{folder}", "out", "--samples-per-shard", "0"], "expected at least 1"),
        (["{folder}", "out", "--holdout", "1.5"], "leaves one side empty"),
        (["empty", "out"], "holds no image"),
        (["table.csv", "out"], "no image column"),
        (["broken.parquet", "out"], "not a readable parquet table"),
        (["empty", "--index-only"], "no .tar in"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    assert main(["data", "pairs", *(argument.format(folder=folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.tar"))
