"""Tars and folders as other tools leave them: read whole, or said why not; what is not read is counted by reason."""

import json
import os

import pytest
from interloom.train.data.augment import AugmentConfig
from interloom.train.data.pairs import build
from interloom.train.data.pairs.dataset import PairsConfig, pairs_loader
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.data.shards.verify import verify_folder
from interloom.train.evaluation.groupvit.retrieval import _pair

from .foreign import index, make, pairs_of, picture, write_tar


@pytest.mark.parametrize("name", ["txt", "text", "caption", "TXT", "transcript", "Caption", "json", "jsn"])
def test_every_name_of_a_caption_is_read(tmp_path, capsys, name):
    text = json.dumps({"caption": "a red ball"}) if name.startswith("js") else "\ufeffa red\u3000ball"
    write_tar(
        tmp_path / "a.tar",
        [(f"{i}.{e}", d) for i in range(3) for e, d in (("JPG", picture(i)), (name, text))],
    )
    assert index(tmp_path) == 0
    assert "3 pairs of 3 samples" in capsys.readouterr().out
    assert pairs_of(tmp_path) == [(picture(i), ["a red ball"]) for i in range(3)]


def test_webdatasets_own_writer(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "%06d.tar"), maxcount=3, verbose=0) as sink:
        for i in range(7):
            sink.write({"__key__": f"k{i}", "jpg": picture(i), "txt": f"row {i}", "json": {"nouns": ["x"]}})
    assert index(tmp_path) == 0
    assert pairs_of(tmp_path) == [(picture(i), [f"row {i}"]) for i in range(7)]


def test_what_nobody_wrote_into_a_tar_is_noted_and_left_alone(tmp_path, capsys):
    members = [m for i in range(4) for m in (
        (f"./._{i}.jpg", b"\0\5\26\7"), (f"./{i}.jpg", picture(i)), (f"__MACOSX/._{i}.txt", b"\0\5"),
        (f"./{i}.txt", "x"), (f".ipynb_checkpoints/{i}.jpg", picture(i)),
    )]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    assert index(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "4 pairs of 4 samples" in shown
    assert "noted: 12 × hidden or system file" in shown
    assert verify_folder(tmp_path) == []


def test_letters_and_spaces_of_every_script_are_names(tmp_path):
    keys = [
        "a\u3000b",
        "c d",
        "e\u00a0f",
        "\u2003g\u2009",
        "h\u2028i",
        "\u0646\u06cc\u200c\u06a9",
        "\u72ac",
        "\U0001f415",
    ]
    write_tar(
        tmp_path / "a.tar", [(f"{k}.{e}", d) for k in keys for e, d in (("jpg", picture(1)), ("txt", k))]
    )
    assert index(tmp_path) == 0
    reader = ShardReader(ShardSet.open(tmp_path))
    assert [reader.read(i).key for i in range(len(reader.shards))] == keys
    assert verify_folder(tmp_path) == []


@pytest.mark.parametrize(("mode", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tars_say_what_to_do(tmp_path, capsys, mode, tool):
    members = [("a.jpg", picture(0)), ("a.txt", "x")]
    write_tar(tmp_path / "named" / f"a.tar.{mode}", members, f"w:{mode}")
    write_tar(tmp_path / "misnamed" / "a.tar", members, f"w:{mode}")
    for place in (tmp_path / "named", tmp_path / "named" / f"a.tar.{mode}", tmp_path / "misnamed"):
        assert index(place) == 2
        assert tool in capsys.readouterr().err
    assert make(tmp_path / "named", tmp_path / "out") == 2
    assert "--index-only" in capsys.readouterr().err


def test_bytes_behind_the_end_are_noted(tmp_path, capsys):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", picture(0)), (f"{name}.txt", "x")])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert index(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "1 × bytes behind the end marker: a.tar (from byte 10240 of 20480)" in shown
    assert "2 pairs of 2 samples" in shown
    assert any("bytes behind the end marker" in problem for problem in verify_folder(tmp_path))


@pytest.mark.parametrize("kind", ["no captions", "no images", "empty", "blank captions"])
def test_an_empty_result_is_a_failure(tmp_path, capsys, kind):
    write_tar(tmp_path / "a.tar", {
        "no captions": [("a.jpg", picture(0)), ("a.cls", "1")], "no images": [("a.txt", "x"), ("a.tiff", b"x")],
        "empty": [], "blank captions": [("a.jpg", picture(0)), ("a.txt", " \u3000\n")],
    }[kind])  # fmt: skip
    for _ in range(2):
        assert index(tmp_path) == 2
        assert "became a pair" in capsys.readouterr().err


def test_pipes_and_broken_links_are_no_tars(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.tar")
    assert index(tmp_path) == 2
    assert "is no file" in capsys.readouterr().err
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar").symlink_to("nowhere.tar")
    assert index(tmp_path) == 2


def test_an_index_of_the_older_rules_is_made_anew(tmp_path):
    from interloom.train.data.shards.index import file_sha256, write_index

    path = tmp_path / "a.tar"
    write_tar(path, [("a.jpg", picture(0)), ("a.text", "x")])
    write_index(
        path, [], size=path.stat().st_size, sha256=file_sha256(path), metadata={"nouns": [None, None]}
    )
    assert index(tmp_path) == 0
    assert len(pairs_of(tmp_path)) == 1


def test_one_bad_text_stops_nothing(tmp_path, capsys):
    deep = "[" * 100_000 + "]" * 100_000
    write_tar(tmp_path / "a.tar", [m for i, text in enumerate([
        ("txt", "plain"), ("json", '{"caption": "lone \\ud83d here"}'), ("txt", "bell\x07 and \x1b[31m"),
        ("txt", b"\xff\xfe\xfa"), ("json", deep), ("json", '{"caption": {"x": 1}}'), ("json", '["one", "two", "one"]'),
    ]) for m in ((f"{i}.jpg", picture(i)), (f"{i}.{text[0]}", text[1]))]
      + [("7.jpg", picture(7)), ("7.txt", "kept"), ("7.json", deep)])  # fmt: skip
    assert index(tmp_path) == 0
    shown = capsys.readouterr().out
    assert "5 pairs of 8 samples" in shown
    assert "noted: 1 × lone surrogates, read as U+FFFD: a.tar/1" in shown
    assert "noted: 1 × control characters, read as spaces: a.tar/2" in shown
    assert "unreadable metadata, not used: a.tar/" in shown
    assert "left out: 2 × empty caption" in shown
    assert [captions for _, captions in pairs_of(tmp_path)] == [
        ["plain"], ["lone \ufffd here"], ["bell and [31m"], ["one", "two"], ["kept"],
    ]  # fmt: skip
    out = tmp_path / "out"
    table = tmp_path / "t.jsonl"
    (tmp_path / "p.jpg").write_bytes(picture(0))
    table.write_text(
        '{"image": "p.jpg", "text": "lone \\ud83d"}\n{"image": "p.jpg", "text": "\\u0000a"}\n' + deep + "\n"
    )
    assert make(table, out, "--max-skip-rate", "0.5") == 0
    shown = capsys.readouterr().out
    assert "noted: 1 × lone surrogates, read as U+FFFD: row 0" in shown
    assert "left out: 1 × broken JSON: row 2" in shown
    assert "2 pairs of 3 rows" in shown


def test_training_and_retrieval_read_the_same_captions(tmp_path):
    forms = [("txt", "plain"), ("json", '{"caption": "in json"}'), ("caption", "other name"),
             ("json", '{"captions": ["one", "two"]}'), ("json", '{"text": "as text"}')]  # fmt: skip
    members = [((f"{i}.jpg", picture(i)), (f"{i}.{form[0]}", form[1])) for i, form in enumerate(forms)]
    write_tar(tmp_path / "a.tar", [member for pair in members for member in pair])
    assert index(tmp_path) == 0
    config = PairsConfig(train=[str(tmp_path)], val=[str(tmp_path)], image_size=16, batch_size=5, eval_batch_size=5,
                         workers=0, shuffle=False, augment=AugmentConfig())  # fmt: skip
    reader = ShardReader(ShardSet.open(tmp_path))
    found = [_pair(reader, sample)[1] for sample in range(5)]
    assert found == [["plain"], ["in json"], ["other name"], ["one", "two"], ["as text"]]
    loader = pairs_loader(config, max_steps=40)
    drawn = [{batch["captions"][place] for batch in loader} for place in range(5)]
    assert drawn == [set(captions) for captions in found]
    assert next(iter(pairs_loader(config, max_steps=1)))["captions"] == next(iter(loader))["captions"]
    assert next(iter(pairs_loader(config, split="val")))["captions"] == [captions[0] for captions in found]


def test_shards_of_one_name_in_different_folders_are_told_apart(tmp_path):
    for folder in ("x/a/train", "x/b/train", "y/a/train"):
        write_tar(tmp_path / folder / "000000.tar", [("k.jpg", picture(0)), ("k.txt", folder)])
        assert index(tmp_path / folder) == 0
    two = ShardSet.open([tmp_path / "x/a/train", tmp_path / "x/b/train"])
    assert [shard.name for shard in two.shards] == ["a/train/000000.tar", "b/train/000000.tar"]
    three = ShardSet.open([tmp_path / folder for folder in ("x/a/train", "x/b/train", "y/a/train")])
    assert [shard.name for shard in three.shards] == [
        f"{f}/000000.tar" for f in ("x/a/train", "x/b/train", "y/a/train")
    ]
    with pytest.raises(ValueError, match="given twice"):
        ShardSet.open([tmp_path / "x/a/train", tmp_path / "x/b/../a/train"])


def test_a_place_that_cannot_be_written_gets_a_sentence(tmp_path, capsys, monkeypatch):
    write_tar(tmp_path / "a.tar", [("k.jpg", picture(0)), ("k.txt", "x")])

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_index", refuse)
        assert index(tmp_path) == 2
    assert "ln -s" in capsys.readouterr().err
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.tar").symlink_to(tmp_path / "a.tar")
    assert index(links) == 0
    # Once it is all there nothing is written again, so that it may lie in a read-only place.
    with monkeypatch.context() as patch:
        patch.setattr("interloom.train.data.shards.writer.write_atomically", refuse)
        assert index(links) == 0
