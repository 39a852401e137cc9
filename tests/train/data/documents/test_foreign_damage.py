"""Damaged, hostile and unusual documents: counted, bounded, and never a reason to stop the others."""

import gzip
import io
import json
import os
import resource
import time

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from interloom.train.cli import main
from interloom.train.data import decode, parquet_rows
from interloom.train.data.documents import images
from interloom.train.data.documents.build import convert
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.sources import list_chunks, read_chunk
from interloom.train.data.report import SkipReport
from PIL import Image

from .conftest import picture, record
from .foreign import WORDS, lines, options, stored


def png(width, height) -> bytes:
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_what_a_filter_drops_is_never_decoded(tmp_path, tokenizer_folder, monkeypatch):
    (tmp_path / "big.png").write_bytes(png(10_000, 6_200))
    calls = []
    real = decode.Picture.decode
    monkeypatch.setattr(decode.Picture, "decode", lambda self, *a: calls.append(self.name) or real(self, *a))
    monkeypatch.setattr(images.EncodedPicture, "__init__", lambda self, *a: calls.append(1))
    rows = [{"images": [None, *["big.png"] * 40], "texts": [WORDS, *[None] * 40]}]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    metadata = json.dumps([None, *({"src": str(n)} for n in range(40))])
    (tmp_path / "d.jsonl").write_bytes(lines([{**rows[0], "metadata": metadata}]))
    report = convert(
        str(tmp_path / "d.jsonl"),
        tmp_path / "out",
        ConvertOptions(str(tokenizer_folder), image_root=str(tmp_path)),
    )
    assert report.counts == {"document with more than 30 images": 1}
    assert calls == []


def test_one_picture_many_times_is_decoded_once(tmp_path, tokenizer_folder, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    made = []
    real = decode.Picture.stored
    monkeypatch.setattr(decode.Picture, "stored", lambda self, side: made.append(1) or real(self, side))
    metadata = json.dumps([{"src": str(n)} for n in range(40)])
    (tmp_path / "d.jsonl").write_bytes(
        lines([{"images": ["a.jpg"] * 40, "texts": [None] * 40, "metadata": metadata}])
    )
    convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    assert len(stored(tmp_path / "out")[0].json()["images"]) == 40
    assert made == [1]


def test_the_images_of_a_document_are_bounded_together(tmp_path, tokenizer_folder, monkeypatch):
    data = picture(1)
    (tmp_path / "a.jpg").write_bytes(data)
    monkeypatch.setattr(images, "MAX_DOCUMENT", 3 * len(data))
    metadata = json.dumps([{"src": str(n)} for n in range(120)])
    row = {"images": ["a.jpg"] * 120, "texts": [None] * 120, "metadata": metadata}
    (tmp_path / "d.jsonl").write_bytes(lines([row]))
    report = convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    assert report.skipped == 117
    assert len(stored(tmp_path / "out")[0].json()["images"]) == 3


def test_pictures_that_are_no_files_cost_their_image_alone(tmp_path, tokenizer_folder):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "d.jsonl").write_bytes(
        lines([record([WORDS, ("a", "pipe.jpg")]), record([WORDS, ("b", "zero.jpg")])])
    )
    began = time.perf_counter()
    report = convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    assert time.perf_counter() - began < 5
    assert report.counts == {"image: not a file": 1, "image: path leads out of the image folder": 1}


def hostile_files(folder):
    parquet.write_table(
        pa.table({"images": pa.nulls(20_000_000, pa.list_(pa.binary()))}),
        folder / "rows.parquet",
        row_group_size=20_000_000,
    )
    cell = pa.array([bytes(100_000_000)], pa.large_binary())
    parquet.write_table(pa.table({"general_metadata": cell}), folder / "cell.parquet", compression="zstd")
    del cell
    (folder / "deep.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    (folder / "deep.jsonl").write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 8_000_000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines([{"n": n} for n in range(900)]))[:-30])
    (folder / "noise.parquet").write_bytes(b"PAR1" + os.urandom(300) + b"PAR1")
    (folder / "noise.zst").write_bytes(os.urandom(300))


@pytest.mark.faults
def test_hostile_files_cost_little_and_stop_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "GROUP_BYTES", 2**26)  # a cell of a gigabyte takes minutes to make
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(picture(1))
    (source / "good.jsonl").write_bytes(lines([record([WORDS, ("a", "a.jpg")])]))
    pid = os.fork()
    if pid == 0:  # what makes the files takes gigabytes itself
        hostile_files(source)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = SkipReport()
    chunks = list_chunks(str(source), 4096, report)
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
    assert {name.rpartition("/")[2].split()[0] for name in report.names["file damaged"]} >= {
        "noise.parquet",
        "noise.zst",
    }
    assert report.counts["row group of more than 1,048,576 rows"] == 1
    assert report.counts["unpacks to more than 50 times its size"] == 1
    assert report.counts["row group of more than 67,108,864 bytes"] == 1
    assert "good.jsonl" in {os.path.basename(chunk.path) for chunk in chunks}
    bad = [r for c in chunks if "deep" in c.path for _, r in read_chunk(c)]
    assert [b.reason for b in bad] == ["line is not a JSON object"] * 2


def test_small_hostile_files(tmp_path):
    (tmp_path / "deep.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(60_000_000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(
        gzip.compress(lines([{"n": str(n) * 9} for n in range(900)]))[:-9]
    )
    (tmp_path / "noise.parquet").write_bytes(b"PAR1" + bytes(range(200)) + b"PAR1")
    (tmp_path / "good.jsonl").write_bytes(b'{"n": 1}\n')
    report = SkipReport()
    chunks = list_chunks(str(tmp_path), 4096, report)
    assert report.counts == {"file damaged": 2, "unpacks to more than 50 times its size": 1}
    read = [r for c in chunks for _, r in read_chunk(c) if isinstance(r, dict)]
    assert {"n": 1} in read
    assert len(read) > 500  # what stands before the cut


def test_nothing_made_is_a_failure(tmp_path, tokenizer_folder, capsys):
    (tmp_path / "d.jsonl").write_bytes(lines([record([WORDS, ("a", "missing.jpg")])] * 2))
    call = [
        "data",
        "obelics",
        str(tmp_path / "d.jsonl"),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer_folder),
    ]
    for _ in range(2):
        assert main([*call, "--min-words", "1000", "--workers", "1"]) == 2
        assert "no document of" in capsys.readouterr().err.replace("\n", " ")


def test_a_source_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    for path in (str(tmp_path / "x.jsonl"), "/dev/zero"):
        with pytest.raises(ValueError, match="is a pipe"):
            list_chunks(path, 10)
    with pytest.raises(FileNotFoundError, match="not a file"):
        list_chunks(str(tmp_path), 10)


def test_what_filters_chose_and_what_was_mended_is_no_damage(tmp_path, tokenizer_folder, capsys):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    twice = {"images": ["a.jpg", "a.jpg", None], "texts": [None, None, WORDS], "metadata": None}
    rows = [record([WORDS + " \ud83d <image>", ("a", "a.jpg")]), twice, record(["short", ("a", "a.jpg")])]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    asked = ["data", "obelics", str(tmp_path / "d.jsonl"), str(tmp_path / "out"), "--min-side", "1"]
    assert main([*asked, "--tokenizer", str(tokenizer_folder), "--image-root", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "left out: 1 × duplicate image" in shown
    assert "noted: 1 × lone surrogate read as U+FFFD: d-000000000" in shown
    assert "noted: 1 × special token in text removed" in shown
    assert json.loads((tmp_path / "out/report.json").read_text())["skipped"] == 2
    assert main(["data", "verify", str(tmp_path / "out")]) == 0


def test_the_advice_to_give_an_image_root_is_not_answered_with_what_was_made_without(
    tmp_path, tokenizer_folder, capsys
):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "d.jsonl").write_bytes(lines([record([WORDS, ("a", "a.jpg")])]))
    asked = [
        "data",
        "obelics",
        str(tmp_path / "d.jsonl"),
        "--tokenizer",
        str(tokenizer_folder),
        "--no-filters",
    ]
    root = ["--image-root", str(tmp_path)]
    assert main([*asked, str(tmp_path / "out")]) == 2
    assert "not one image" in capsys.readouterr().err
    assert main([*asked, str(tmp_path / "out"), *root]) == 2
    assert "image_root changed" in capsys.readouterr().err
    assert main([*asked, str(tmp_path / "new"), *root]) == 0
    assert "with 1 images" in capsys.readouterr().err
    for wrong, words in (("--max-side", "16 pixels"), ("--records-per-shard", "at least 1")):
        assert main([*asked, str(tmp_path / "none"), *root, wrong, "0"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_utf_16_and_every_packing_that_tables_have(tmp_path):
    import bz2
    import lzma

    wanted = [{"n": n, "text": "né 犬\n" * 20} for n in range(50)]
    wide = "".join(json.dumps(one, ensure_ascii=False) + "\r\n" for one in wanted)
    for name, data in {
        "le.jsonl": wide.encode("utf-16"),
        "be.jsonl.gz": gzip.compress(b"\xfe\xff" + wide.encode("utf-16-be")),
        "list.json": json.dumps(wanted, indent=1).encode("utf-16"),
        "b.jsonl.bz2": bz2.compress(lines(wanted)),
        "x.json.xz": lzma.compress(lines(wanted)),
    }.items():
        (tmp_path / name).write_bytes(data)
        chunks = list_chunks(str(tmp_path / name), 7)
        assert [one for chunk in chunks for _, one in read_chunk(chunk)] == wanted, name


def test_a_saved_dictionary_of_splits_asks_for_one(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"images": [None], "texts": [WORDS]}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="holds splits train, test; give the folder of one"):
        list_chunks(str(tmp_path / "saved"), 10)
    assert len(list_chunks(str(tmp_path / "saved" / "train"), 10)) == 1
