"""Documents that nobody here made: every kind of file, of record and of damage, and their tokens."""

import base64
import gzip
import io
import json
import os
import resource
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interloom.models.idefics.image_processing import IdeficsImageProcessor
from interloom.models.idefics.processing import IdeficsProcessor
from interloom.models.idefics.tokenizer import IdeficsTokenizer
from interloom.train.cli import main
from interloom.train.data import decode, parquet_rows
from interloom.train.data.documents import images, record_files
from interloom.train.data.documents.build import convert
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.records import Filters, deduplicate, parse_record
from interloom.train.data.documents.sources import list_chunks, read_chunk
from interloom.train.data.report import SkipReport
from interloom.train.data.shards.reader import ShardReader, ShardSet
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from .conftest import picture, record

WORDS = "the number of objects is one . the red one is a mushroom ."


def stored(folder):
    shards = ShardSet.open([str(folder)], kind="documents")
    reader = ShardReader(shards)
    return [reader.read(sample) for sample in range(len(shards))]


def options(tokenizer_folder, root=None, **more):
    return ConvertOptions(
        str(tokenizer_folder), filters=Filters.none(), image_root=root and str(root), **more
    )


def lines(records) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def compressed(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def test_a_folder_of_every_kind_of_file_is_read_whole(tmp_path):
    wanted = [{"n": n, "text": 'a "[{,}]" \\ b\n'} for n in range(44)]
    parts = [wanted[i : i + 4] for i in range(0, 44, 4)]
    (tmp_path / "sub").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    files = {
        "a.jsonl": b"\xef\xbb\xbf" + lines(parts[0]),
        "b.jsonl.gz": gzip.compress(lines(parts[1])) + gzip.compress(b"\n \n"),
        "c4-train.00000-of-01024.json.gz": gzip.compress(lines(parts[2])),
        "c4-train.00001-of-01024.json.gz": gzip.compress(lines(parts[3])),
        "d.json": json.dumps(parts[4], indent=2).encode(),
        "e.zst": compressed(lines(parts[5])),
        "f.jsonl.zst": compressed(lines(parts[6]).replace(b"\n", b"\r\n\r\n")),
        "g.JSON": lines(parts[7]),
        "h.json.gz": gzip.compress(json.dumps(parts[8]).encode()),
        "sub/a.jsonl": lines(parts[9]).rstrip(),
        "sub/one.json": json.dumps(parts[10][0], indent=1).encode(),
        "notes.txt": b"x",
        "._a.jsonl": b"\0",
        ".ipynb_checkpoints/a.jsonl": lines(parts[0]),
        "_SUCCESS": b"",
        "0.png": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.jsonl").symlink_to("/etc/hostname")
    for size in (1, 3, 1000):
        report = SkipReport()
        chunks = list_chunks(str(tmp_path), size, report)
        read = [entry for chunk in chunks for entry in read_chunk(chunk)]
        assert sorted(r["n"] for _, r in read) == list(range(41)), size
        assert [r for _, r in read if r["n"] == 17] == [wanted[17]]
        assert len({key for key, _ in read}) == 41
        assert all(chunk.stop - chunk.start <= size for chunk in chunks)
        assert report.counts == {"file of another kind (.txt)": 1, "link out of the folder": 1}
    assert "c4-train-00001-of-01024-000000002" in {key for key, _ in read}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet=st.sampled_from('"\\[]{},: \n\té犬a')),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[{,a', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.dictionaries(st.text("ab", min_size=1, max_size=2), JSON, max_size=3), max_size=6),
    st.sampled_from([None, 1]),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_arrays_are_cut_where_json_cuts_them(tmp_path_factory, values, indent, block, count):
    path = tmp_path_factory.mktemp("array") / "x.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "_BLOCK", block)
        found = []
        for start, stop, offset in record_files.record_ranges(path, "json", count):
            found += [json.loads(r) for r in record_files.read_records(path, "json", offset, stop - start)]
    assert found == values


def test_every_way_of_holding_an_image(tmp_path, tokenizer_folder):
    jpeg = picture(1)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    encoded = base64.b64encode(jpeg).decode()
    held = [
        {"bytes": encoded, "path": None},
        {"bytes": None, "path": "a.jpg"},
        f"data:image/jpeg;base64,{encoded}",
        encoded,
        "a.jpg",
    ]
    rows = [{"images": [None, image], "texts": [WORDS, None]} for image in held]
    (tmp_path / "d.jsonl").write_bytes(lines(rows))
    report = convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    assert report.counts == {}
    found = stored(tmp_path / "out")
    assert [bytes(one.members["0.jpg"]) for one in found] == [jpeg] * 5
    assert all(len(one.json()["images"][0]["src"]) < 10 for one in found)

    structs = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {
            "images": [{"bytes": None, "path": None}, {"bytes": picture(2, kind=k), "path": None}],
            "texts": ["x", None],
        }
        for k in ("GIF", "BMP", "TIFF", "PNG")
    ]
    table = pa.Table.from_pylist(
        rows, schema=pa.schema([("images", pa.list_(structs)), ("texts", pa.list_(pa.string()))])
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    report = convert(str(tmp_path / "d.parquet"), tmp_path / "out2", options(tokenizer_folder))
    assert report.counts == {}
    for one, row in zip(stored(tmp_path / "out2"), rows, strict=True):
        expected = Image.open(io.BytesIO(row["images"][1]["bytes"])).convert("RGB")
        assert np.array_equal(decode.decode_rgb(one.members["0.png"]), np.asarray(expected))


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ("aTa", "aT"),  # nothing tells of the second
        ("aTaT", "aTaT"),
        ("aaT", "aT"),  # the text's image either way
        ("aTbTaT", "aTbTaT"),
        ("abaT", "abaT"),
        ("aTbaT", "aTbaT"),
        ("aTabT", "aTbT"),  # the text tells of b
        ("aT aT", "aT aT"),
        ("aT a ", "aT  "),
    ],
)
def test_repeated_images_stay_where_a_text_refers_to_them(parts, kept):
    rows = [("text" if p == "T" else " ") if p in "T " else (p, b"x") for p in parts]
    found = deduplicate(parse_record(record(rows), "k"), SkipReport()).parts
    assert "".join((" " if p == " " else "T") if isinstance(p, str) else p.src for p in found) == kept


def test_one_bad_text_stops_nothing(tmp_path, tokenizer_folder):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    good = record([WORDS, ("a", "a.jpg")])
    deep = "[" * 100_000 + "]" * 100_000
    texts = [
        lines([good]),
        lines([{**good, "texts": ["a lone \ud83d here \udc00", None]}]),
        lines([{**good, "texts": ["bell \x07 nul \0 escape \x1b[31m", None]}]),
        lines([{**good, "metadata": deep}]),
        lines([{**good, "general_metadata": deep}]),
        lines([{**good, "general_metadata": "x" * 3_000_000}]),
        lines([good]).replace(b'"general_metadata"', b'"more": ' + deep.encode() + b', "general_metadata"'),
        lines([{**good, "images": [None, "a\0.jpg"]}]),
        lines([{**good, "images": [None, "a\ud83d.jpg"], "metadata": json.dumps([None, {"src": "\ud83d"}])}]),
        lines([good]),
    ]
    (tmp_path / "d.jsonl").write_bytes(b"".join(texts))
    report = convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    assert report.seen == 10
    assert report.names["lone surrogate read as U+FFFD"] == ["d-000000001", "d-000000008"]
    assert report.counts["lone surrogate read as U+FFFD"] == 3
    assert report.counts["metadata is not JSON"] == 1
    assert report.counts["line is not a JSON object"] == 1
    assert report.counts["general_metadata too large or too deep, left out"] == 1
    assert report.counts["image: path leads out of the image folder"] == 2
    found = {one.key: one.json() for one in stored(tmp_path / "out")}
    assert len(found) == 8
    assert found["d-000000001"]["texts"][0] == "a lone � here �"
    assert found["d-000000002"]["texts"][0] == "bell \x07 nul \0 escape \x1b[31m"


def test_losses_are_counted_once(tmp_path, tokenizer_folder):
    good = record([WORDS, ("a", "a.jpg")])
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / "d.jsonl").write_bytes(lines([good, {**good, "images": 3}, {**good, "texts": 3}, good]))
    report = convert(str(tmp_path / "d.jsonl"), tmp_path / "out", options(tokenizer_folder, tmp_path))
    shards = ShardSet.open([str(tmp_path / "out")], kind="documents")
    assert shards.index(0).header["report"] == report.to_dict()
    assert (report.seen, report.skipped) == (4, 2)


def tokenizer(folder, kind):
    """A tokenizer to which every character matters."""
    special = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>"]
    extra = ["<end_of_utterance>"] if kind == "utterances" else []
    characters = [*map(chr, range(32, 127)), "\n", "\t", "é", "犬", "\u3000", "▁"]
    backend = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*special, *extra, *characters])}, "<unk>")
    )
    split = pre_tokenizers.Split("", "isolated")
    if kind == "metaspace":  # LLaMA's: what a text begins with depends on what stands before it
        split = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), split])
    backend.pre_tokenizer = split  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in [*special, *extra]])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "additional_special_tokens": extra}))


TEXT = st.text(st.sampled_from("ab. \n\té犬\u3000"), max_size=6)


@pytest.mark.parametrize("kind", ["characters", "metaspace", "utterances"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(records=st.lists(st.lists(st.none() | TEXT, min_size=1, max_size=7), min_size=1, max_size=4))
def test_tokens_of_a_shard_are_the_processors(tmp_path_factory, kind, records):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer(folder, kind)
    rows = [
        record([(f"{n}", picture(n, (8, 8))) if part is None else part for n, part in enumerate(parts)])
        for parts in records
    ]
    for row in rows:
        row["images"] = [i and {"bytes": base64.b64encode(i).decode(), "path": None} for i in row["images"]]
    (folder / "d.jsonl").write_bytes(lines(rows))
    report = convert(str(folder / "d.jsonl"), folder / "out", options(folder))
    assert report.counts == {}
    processor = IdeficsProcessor(
        IdeficsImageProcessor(image_size=8),
        IdeficsTokenizer.from_files(lambda name: folder / name if (folder / name).is_file() else None, "x"),
    )
    found = {one.key: one.json() for one in stored(folder / "out")}
    for number, parts in enumerate(records):
        shown = [Image.new("RGB", (8, 8)) if part is None else part for part in parts]
        expected = processor([shown], add_eos_token=True)["input_ids"][0].tolist()
        content = found[f"d-{number:09d}"]
        assert content["ids"] == expected
        assert content["texts"] == parts
        starts = content["image_starts"]
        assert [expected[s + 1] for s in starts] == [processor.image_token_id] * parts.count(None)


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
