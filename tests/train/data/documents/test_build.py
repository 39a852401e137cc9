"""From published records to shards, checked against the records themselves."""

import json
import os
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from interloom.train.data.documents.build import convert
from interloom.train.data.documents.options import ConvertOptions
from interloom.train.data.documents.records import (
    END_OF_DOCUMENT,
    Document,
    Filters,
    Picture,
    deduplicate,
    filter_document,
    parse_record,
    split_document,
)
from interloom.train.data.documents.sources import list_chunks, read_chunk
from interloom.train.data.documents.tokenization import DocumentTokenizer
from interloom.train.data.report import BadSample, SkipReport
from interloom.train.data.shards.reader import ShardReader, ShardSet

from .conftest import picture, record

WORDS = "the number of objects is one . the red one is a mushroom ."


def image(name, data=None, **options):
    return (f"http://example.org/{name}", picture(hash(name) % 100, **options) if data is None else data)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def write_parquet(path, records):
    schema = pa.schema(
        [
            ("images", pa.list_(pa.binary())),
            ("texts", pa.list_(pa.string())),
            ("metadata", pa.string()),
            ("general_metadata", pa.string()),
        ]
    )
    parquet.write_table(pa.Table.from_pylist(records, schema=schema), path, row_group_size=3)
    return path


def stored(folder):
    """Key to (content, image bytes) of every document in a folder of shards."""
    shards = ShardSet.open([folder], kind="documents")
    reader = ShardReader(shards)
    found = {}
    for sample in range(len(shards)):
        one = reader.read(sample)
        members = {k: bytes(v) for k, v in one.members.items() if k != "json"}
        found[one.key] = (one.json(), members)
    return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": None}, "no images or texts list"),
        ({"texts": ["a"]}, "images and texts differ in length"),
        ({"texts": ["a", "b"]}, "not exactly one of image and text"),
        ({"texts": [None, None]}, "not exactly one of image and text"),
        ({"texts": [3, None]}, "text is not a string"),
        ({"metadata": "[null"}, "metadata is not JSON"),
        ({"metadata": "[null]"}, "metadata differs in length"),
    ],
)
def test_malformed_records_have_a_reason(change, reason):
    good = record(["a", image("x")])
    with pytest.raises(BadSample) as caught:
        parse_record({**good, **change}, "k")
    assert caught.value.reason == reason


def test_split_at_the_marker_keeps_order_and_images():
    parts = ["one", image("a"), f"two {END_OF_DOCUMENT} three", image("b"), END_OF_DOCUMENT, "four"]
    found = split_document(parse_record(record(parts), "k"))
    shape = [[p if isinstance(p, str) else p.src[-1] for p in d.parts] for d in found]
    assert shape == [["one", "a", "two "], [" three", "b"], ["four"]]
    assert [d.key for d in found] == ["k", "k-1", "k-2"]


def test_deduplicate_keeps_the_first():
    report = SkipReport()
    kept = deduplicate(parse_record(record([image("a"), "t", image("b"), image("a")]), "k"), report)
    assert [p.src[-1] for p in kept.pictures] == ["a", "b"]
    assert report.counts == {"duplicate image": 1}


def test_published_filters():
    def doc(images, words):
        pictures = [Picture(b"", str(n), *size, "jpg", b"x") for n, size in enumerate(images)]
        return Document("k", (" ".join(["w"] * words), *pictures))

    def outcome(images, words):
        report = SkipReport()
        kept = filter_document(doc(images, words), Filters(), report)
        return None if kept is None else len(kept.pictures), dict(report.counts)

    assert outcome([(150, 300)], 10) == (1, {})
    assert outcome([(149, 200), (200, 200)], 10) == (1, {"image smaller than 150 px": 1})
    assert outcome([(20_001, 15_000), (200, 200)], 10) == (1, {"image larger than 20000 px": 1})
    assert outcome([(401, 200), (200, 200)], 10) == (1, {"image aspect over 2": 1})
    assert outcome([(200, 200)], 9) == (None, {"document with fewer than 10 words": 1})
    assert outcome([(200, 200)], 2001) == (None, {"document with more than 2000 words": 1})
    assert outcome([(200, 200)] * 31, 20) == (None, {"document with more than 30 images": 1})
    # an image whose bytes could not be had still counts: the page stays
    lost = Document("k", ("w " * 20, Picture("http://x", "x")))
    assert filter_document(lost, Filters(), SkipReport()) == lost


def test_tokens_are_those_of_the_prompt(tokenizer_folder):
    tokenizer = DocumentTokenizer(tokenizer_folder)
    parts = (WORDS, Picture(0), Picture(1), "the apple is red .", "the fish is blue .", Picture(2))
    ids, starts = tokenizer.encode(Document("k", parts))
    around, pic = "<fake_token_around_image>", "<image>"
    prompt = (
        f"<s>{WORDS}{around}{pic}{around}{pic}{around}the apple is red .the fish is blue ."
        f"{around}{pic}{around}</s>"
    )
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(
        prompt, add_special_tokens=False
    )
    assert ids == reference.ids
    image_id = reference.tokens.index(pic)
    assert starts[0] == image_id - 1
    assert [ids[s] for s in starts] == [tokenizer.around_id] * 3
    assert starts[1] - starts[0] == 2  # neighbours share the token between them


def test_written_special_tokens_cannot_fake_an_image(tokenizer_folder):
    tokenizer, report = DocumentTokenizer(tokenizer_folder), SkipReport()
    ids, starts = tokenizer.encode(Document("k", ("the <image> is </s> red <s>",)), report)
    assert starts == []
    assert ids[1:-1] == tokenizer.encode_text("the  is  red ")
    assert report.counts["special token in text removed"] == 3


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(ValueError, match="has no token '<image>'"):
        DocumentTokenizer(tmp_path)


def many(count=23):
    return [
        record([WORDS + f" {n}", image(f"p{n}"), "the apple is red .", image(f"q{n}")]) for n in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder", "datasets"])
def test_every_source_gives_the_same_documents(tmp_path, tokenizer_folder, kind):
    records = many(8)
    if kind == "jsonl":
        for n, r in enumerate(records):
            for place, data in enumerate(r["images"]):
                if data:
                    (tmp_path / f"{n}-{place}.jpg").write_bytes(data)
                    r["images"][place] = f"{n}-{place}.jpg"
        source = write_jsonl(tmp_path / "data.jsonl", records)
    elif kind == "parquet":
        source = write_parquet(tmp_path / "data.parquet", records)
    elif kind == "folder":
        source = tmp_path / "in"
        source.mkdir()
        write_parquet(source / "a.parquet", records[:5])
        write_parquet(source / "b.parquet", records[5:])
    else:
        import datasets

        source = tmp_path / "saved"
        features = datasets.Features(
            {
                "images": datasets.List(datasets.Image(decode=False)),
                "texts": datasets.List(datasets.Value("string")),
                "metadata": datasets.Value("string"),
                "general_metadata": datasets.Value("string"),
            }
        )
        rows = [{**r, "images": [d and {"bytes": d, "path": None} for d in r["images"]]} for r in records]
        datasets.Dataset.from_list(rows, features=features).save_to_disk(str(source))
    options = ConvertOptions(str(tokenizer_folder), records_per_shard=3, image_root=str(tmp_path))
    report = convert(str(source), tmp_path / "out", options)
    found = list(stored(tmp_path / "out").values())
    assert report.seen == 8
    assert [content["texts"] for content, _ in found] == [r["texts"] for r in many(8)]
    assert [list(images.values()) for _, images in found] == [[d for d in r["images"] if d] for r in many(8)]
    tokenizer = DocumentTokenizer(tokenizer_folder)
    for content, _ in found:
        assert content["ids"][0] == tokenizer.bos_id
        assert (
            content["ids"].count(tokenizer.image_id) == len(content["images"]) == len(content["image_starts"])
        )


def test_a_failed_image_leaves_its_document_whole(tmp_path, tokenizer_folder):
    broken = picture(1)[:-200]
    rows = [
        record([WORDS, ("a", 0), "the apple is red .", ("b", 0), "x", ("c", 0)]),
        record([WORDS, ("z", 0)]),
        record(["short", ("s", "missing.jpg")]),
    ]
    source = tmp_path / "d.jsonl"
    (tmp_path / "a.jpg").write_bytes(picture(2))
    (tmp_path / "b.jpg").write_bytes(broken)
    (tmp_path / "z.jpg").write_bytes(b"<html>no</html>")
    rows[0]["images"] = [None, "a.jpg", None, "b.jpg", None, "http://example.org/c.jpg"]
    rows[1]["images"] = [None, "z.jpg"]
    write_jsonl(source, rows)
    options = ConvertOptions(str(tokenizer_folder), image_root=str(tmp_path))
    report = convert(str(source), tmp_path / "out", options)
    found = stored(tmp_path / "out")
    assert [c["texts"] for c, _ in found.values()] == [[WORDS, None, "the apple is red .", "\n\nx"], [WORDS]]
    assert report.counts == {
        "image: broken image": 1,
        "image: only an address (use --fetch)": 1,
        "image: not an image": 1,
        "image: no such file": 1,
        "document with fewer than 10 words": 1,
    }


def test_paths_cannot_leave_the_image_folder(tmp_path, tokenizer_folder):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(picture())
    source = write_jsonl(tmp_path / "d.jsonl", [record([WORDS, ("s", "../secret.jpg")])])
    options = ConvertOptions(str(tokenizer_folder), image_root=str(tmp_path / "images"))
    report = convert(str(source), tmp_path / "out", options)
    assert report.counts == {"image: path leads out of the image folder": 1}


def test_a_stopped_conversion_goes_on_without_redoing(tmp_path, tokenizer_folder):
    source = write_parquet(tmp_path / "d.parquet", many())
    options = ConvertOptions(str(tokenizer_folder), records_per_shard=4)
    convert(str(source), tmp_path / "whole", options)
    code = f"""
import os, sys
from interloom.train.data.documents import build as c
done = []
real = c.write_atomically
def stop(path, data):
    if len(done) == 3 and "reports" in str(path):
        os._exit(9)  # after the fourth shard was published, before its report
    done.append(path) if "reports" in str(path) else None
    return real(path, data)
c.write_atomically = stop
c.convert({str(source)!r}, {str(tmp_path / "out")!r}, c.ConvertOptions({str(tokenizer_folder)!r}, records_per_shard=4))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    kept = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").glob("*.tar")}
    assert len(kept) == 4
    calls = []
    report = convert(
        str(source), tmp_path / "out", options, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[0] == (3, 6)
    assert report.seen == 23
    after = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (tmp_path / "out").glob("*.tar")}
    assert sorted(n for n in kept if after[n] == kept[n]) == ["000000.tar", "000001.tar", "000002.tar"]
    for file in (tmp_path / "whole").glob("*.*"):
        if file.suffix in (".tar", ".idx"):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_other_options_on_the_same_folder_are_refused(tmp_path, tokenizer_folder):
    source = write_parquet(tmp_path / "d.parquet", many(3))
    convert(str(source), tmp_path / "out", ConvertOptions(str(tokenizer_folder)))
    with pytest.raises(ValueError, match="filters changed"):
        convert(str(source), tmp_path / "out", ConvertOptions(str(tokenizer_folder), filters=Filters.none()))


def test_processes_write_the_same_bytes(tmp_path, tokenizer_folder):
    source = write_parquet(tmp_path / "d.parquet", many(9))
    options = ConvertOptions(str(tokenizer_folder), records_per_shard=3)
    convert(str(source), tmp_path / "one", options, workers=1)
    convert(str(source), tmp_path / "two", options, workers=2)
    for file in (tmp_path / "one").glob("*.*"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_chunk_without_documents_leaves_no_shard(tmp_path, tokenizer_folder):
    source = write_jsonl(tmp_path / "d.jsonl", [{"nothing": 1}, *many(0)])
    (tmp_path / "d.jsonl").write_text('{"nothing": 1}\nnot json\n')
    report = convert(str(source), tmp_path / "out", ConvertOptions(str(tokenizer_folder)))
    assert report.counts == {"no images or texts list": 1, "line is not a JSON object": 1}
    assert not list((tmp_path / "out").glob("*.tar"))


def test_chunks_cover_every_record_once(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"n": n} for n in range(10)])
    for size in (1, 3, 10, 99):
        chunks = list_chunks(str(path), size)
        rows = [row["n"] for chunk in chunks for _, row in read_chunk(chunk)]
        assert rows == list(range(10))
        assert [c.number for c in chunks] == list(range(len(chunks)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "no source at"),
        ("data.csv", "neither .parquet nor .jsonl"),
        ("empty", "no .parquet or .jsonl"),
    ],
)
def test_unusable_sources(tmp_path, tokenizer_folder, source, message):
    (tmp_path / "data.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        convert(str(tmp_path / source), tmp_path / "out", ConvertOptions(str(tokenizer_folder)))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, tokenizer_folder):
    source = write_parquet(tmp_path / "d.parquet", many(5))
    run = [
        sys.executable, "-c", "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))",
        "data", "obelics", str(source), str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder),
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert "5 documents with 10 images" in done.stderr.replace("\n", " ")
    assert len(stored(tmp_path / "out")) == 5
    run[-1] = str(tmp_path)
    done = subprocess.run(
        [*run[:6], str(tmp_path / "out2"), *run[7:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no tokenizer at" in done.stderr


def test_addresses_are_fetched_where_asked_for(tmp_path, tokenizer_folder):
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from interloom.train.data.download import FetchPolicy

    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.jpg").write_bytes(picture(5))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "web")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    rows = [record([WORDS, (f"{base}/a.jpg", f"{base}/a.jpg"), "x", (f"{base}/b.jpg", f"{base}/b.jpg")])]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    policy = FetchPolicy(retries=0, deadline=5.0, allow_hosts=frozenset({f"127.0.0.1:{server.server_port}"}))
    options = ConvertOptions(
        str(tokenizer_folder), fetch=True, fetch_policy=policy, fetch_cache=str(tmp_path / "cache")
    )
    try:
        report = convert(str(source), tmp_path / "out", options)
    finally:
        server.shutdown()
        server.server_close()
    ((content, images),) = stored(tmp_path / "out").values()
    assert content["texts"] == [WORDS, None, "x"]
    assert list(images.values()) == [picture(5)]
    assert report.counts == {"image: http 404": 1}


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path, tokenizer_folder):
    pytest.importorskip("ray")
    source = write_parquet(tmp_path / "d.parquet", many(5))
    options = ConvertOptions(str(tokenizer_folder), records_per_shard=3)
    convert(str(source), tmp_path / "local", options)
    # A process of its own: a Ray session outlives the code that began it.
    code = (
        "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))",
        "data", "obelics", str(source), str(tmp_path / "ray"), "--tokenizer", str(tokenizer_folder),
        "--records-per-shard", "3", "--engine", "ray", "--workers", "1",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", *code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "local").glob("*.*"):
        if file.suffix in (".tar", ".idx"):
            assert file.read_bytes() == (tmp_path / "ray" / file.name).read_bytes()
