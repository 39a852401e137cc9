"""Documents that nobody here made: every kind of file, of record and of damage, and their tokens."""

import base64
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interloom.models.idefics.image_processing import IdeficsImageProcessor
from interloom.models.idefics.processing import IdeficsProcessor
from interloom.models.idefics.tokenizer import IdeficsTokenizer
from interloom.train.data import decode
from interloom.train.data.documents import record_files
from interloom.train.data.documents.build import convert
from interloom.train.data.documents.records import deduplicate, parse_record
from interloom.train.data.documents.sources import list_chunks, read_chunk
from interloom.train.data.report import SkipReport
from interloom.train.data.shards.reader import ShardSet
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from .conftest import picture, record
from .foreign import WORDS, compressed, lines, options, stored


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
