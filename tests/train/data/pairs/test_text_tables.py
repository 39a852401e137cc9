"""Tables as other programs write them: every cell comes back as the text it was, or one sentence says what to give."""

import csv
import io
import json
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from interloom.train.data.pairs.cells import Columns, listed, texts_of
from interloom.train.data.pairs.nouns import nouns_from_value
from interloom.train.data.pairs.sources import TableSource
from interloom.train.data.pairs.text_tables import read_text_table
from interloom.train.data.report import BadSample
from pyarrow import csv as arrow_csv


def read(path, **options):
    """(image, caption) cells of a table."""
    return [
        row if isinstance(row, BadSample) else row[:2]
        for row in read_text_table(path, Columns(), **options).rows
    ]


def write_csv(path, rows, dialect):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **dialect)
        writer.writerow(("filepath", "caption"))
        writer.writerows(rows)


def write_pandas(path, rows, options):
    pandas.DataFrame(rows, columns=["filepath", "caption"]).to_csv(path, index=False, **options)


def write_arrow(path, rows, delimiter):
    table = pa.table({"filepath": [a for a, _ in rows], "caption": [b for _, b in rows]})
    arrow_csv.write_csv(table, path, arrow_csv.WriteOptions(delimiter=delimiter))


WRITERS = {
    "excel": ("a.csv", lambda p, r: write_csv(p, r, {})),
    "excel-tab": ("a.tsv", lambda p, r: write_csv(p, r, {"dialect": "excel-tab"})),
    "unix": ("a.csv", lambda p, r: write_csv(p, r, {"dialect": "unix"})),
    "semicolon": ("a.csv", lambda p, r: write_csv(p, r, {"delimiter": ";", "quoting": csv.QUOTE_NONNUMERIC})),
    "bar": ("a.txt", lambda p, r: write_csv(p, r, {"delimiter": "|"})),
    "pandas": ("a.csv", lambda p, r: write_pandas(p, r, {})),
    "pandas-tab": ("a.tsv", lambda p, r: write_pandas(p, r, {"sep": "\t"})),
    "pandas-utf16": ("a.csv", lambda p, r: write_pandas(p, r, {"encoding": "utf-16"})),
    "pandas-bom": ("a.csv", lambda p, r: write_pandas(p, r, {"encoding": "utf-8-sig", "sep": ";"})),
    "pandas-gz": ("a.csv.gz", lambda p, r: write_pandas(p, r, {})),
    "arrow": ("a.csv", lambda p, r: write_arrow(p, r, ",")),
    "arrow-tab": ("a.tsv", lambda p, r: write_arrow(p, r, "\t")),
    "jsonl": ("a.jsonl", lambda p, r: pandas.DataFrame(r, columns=["filepath", "caption"]).to_json(
        p, orient="records", lines=True)),
    "json": ("a.json", lambda p, r: p.write_text(json.dumps([{"filepath": a, "caption": b} for a, b in r]))),
    "json-columns": ("a.json", lambda p, r: pandas.DataFrame(r, columns=["filepath", "caption"]).to_json(p)),
}  # fmt: skip

LETTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))
CAPTIONS = st.text(
    st.one_of(st.sampled_from(list("\"',;|\t\n\\ #[]0")), LETTERS), min_size=1, max_size=24
).filter(lambda text: text.strip() and text == text.strip("\n"))


@pytest.mark.parametrize("writer", sorted(WRITERS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(CAPTIONS, min_size=1, max_size=6))
@example(captions=["007", "NA", "true", "2024-01-02", "1e5", "null", "None", "a\tb", 'say "hi"', '"whole"'])
@example(captions=['"Stop', "a, b; c | d", 'said the sign"', "two\nlines\tof text", "\\"])
def test_what_a_program_writes_is_read_as_written(tmp_path, writer, captions):
    name, write = WRITERS[writer]
    rows = [(f"im/{i:03d}.jpg", caption) for i, caption in enumerate(captions)]
    write(tmp_path / name, rows)
    assert read(tmp_path / name) == rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    captions=st.lists(
        st.text(st.one_of(st.sampled_from(list("\"',; #[]0")), LETTERS), min_size=1, max_size=24).filter(
            lambda text: text.strip() and len(text.splitlines()) == 1
        ),
        min_size=2,
        max_size=6,
    )
)
def test_a_tsv_without_quoting_keeps_its_quotes(tmp_path, captions):
    """As Conceptual Captions and other dumps are: lines and tabs, nothing else means anything."""
    captions = ["no quotes", *captions]
    path = tmp_path / "a.tsv"
    path.write_text(
        "filepath\tcaption\n" + "".join(f"im/{i}.jpg\t{text}\n" for i, text in enumerate(captions)), "utf-8"
    )
    found = read(path)
    doubled = any('""' in text for text in captions)
    assert [image for image, _ in found] == [f"im/{i}.jpg" for i in range(len(captions))]
    if not doubled:  # else a quoting writer could have written just this
        assert [caption for _, caption in found] == captions


def test_ids_without_suffix_tell_swallowed_rows_too(tmp_path):
    path = tmp_path / "a.tsv"
    captions = ["a", '"Stop', "b", 'sign"', "c"]
    path.write_text("file\tcaption\n" + "".join(f"{i:03d}\t{text}\n" for i, text in enumerate(captions)))
    assert read(path) == [(f"{i:03d}", text) for i, text in enumerate(captions)]


def test_one_row_with_a_stray_quote_costs_none_of_the_others(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('file,caption\na.jpg,"a dog, a cat"\nb.jpg,"hello" world\nc.jpg,"x, y"\n')
    rows = read(path)
    assert rows[0] == ("a.jpg", "a dog, a cat")
    assert rows[2] == ("c.jpg", "x, y")
    assert len(rows) == 3
    path.write_text('file,caption\na.jpg,"he said \\"hi\\", loud"\nb.jpg,"x, y"\n')
    assert read(path) == [("a.jpg", 'he said "hi", loud'), ("b.jpg", "x, y")]


def test_rows_of_another_length_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("file,caption\na.jpg,one\nb.jpg\nc.jpg,three,,\nd.jpg,four,five\n\n")
    rows = read(path)
    assert (rows[0], rows[2], len(rows)) == (("a.jpg", "one"), ("c.jpg", "three"), 4)
    for place in (1, 3):
        assert rows[place].reason == "row of another length"


def test_long_lines_are_read(tmp_path):
    path = tmp_path / "a.csv"
    long = "word " * 200_000
    path.write_text(f"file,caption\na.jpg,{long}\n")
    assert read(path) == [("a.jpg", long)]


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "shift_jis", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_read_or_named(tmp_path, encoding):
    caption = {
        "cp1251": "красный мяч лежит на полу у дома",
        "shift_jis": "赤いボールが床に落ちている写真です",
    }.get(encoding, "a café in the rue")
    path = tmp_path / "a.csv"
    path.write_bytes(f"file,caption\na.jpg,{caption}\n".encode(encoding))
    if not encoding.startswith("utf"):
        with pytest.raises(ValueError, match=r"not UTF-8 text: byte .*--encoding") as error:
            read(path)
        if encoding == "cp1252":
            assert "--encoding cp1252" in str(error.value)
            assert caption in str(error.value)
    assert read(path, encoding=encoding) == [("a.jpg", caption)]
    if encoding.startswith("utf"):
        assert read(path) == [("a.jpg", caption)]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("picture,words", "'picture', 'words'"),
        ("picture;words", "'picture', 'words'"),
        ("im/0.jpg\ta dog", "'im/0.jpg', 'a dog'"),
    ],
)
def test_unknown_columns_are_shown_with_the_option(tmp_path, header, columns):
    path = tmp_path / "a.csv"
    path.write_text(f"{header}\nx,y\n")
    with pytest.raises(ValueError, match="--image-column") as error:
        read_text_table(path, Columns())
    assert columns in str(error.value)
    assert "--separator" in str(error.value)


def test_headers_in_any_dress(tmp_path):
    path = tmp_path / "a.csv"
    for header in (" Image , Caption ", "IMAGE PATH,Alt-Text", "\ufeffimg,TEXT", '"File Name","Title"'):
        path.write_text(f"{header}\na.jpg,a dog\n", "utf-8")
        assert read(path) == [("a.jpg", "a dog")]
    path.write_text("Picture,Words\na.jpg,a dog\n")
    table = read_text_table(path, Columns("picture", "words"))
    assert table.rows == [("a.jpg", "a dog", None)]


def test_what_excel_and_old_macs_write(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"sep=;\r\nimage;caption\r\na.jpg;x, y\r\n")
    assert read(path) == [("a.jpg", "x, y")]
    path.write_bytes(b"image,caption\ra.jpg,one\rb.jpg,two\r")
    assert read(path) == [("a.jpg", "one"), ("b.jpg", "two")]
    path.write_bytes(b'image, "caption"\na.jpg, "x, y"\nb.jpg, "z"\n')
    assert read(path) == [("a.jpg", "x, y"), ("b.jpg", "z")]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="its columns are none"):
        read(path)


def test_published_forms(tmp_path):
    (tmp_path / "captions.txt").write_text(
        "image,caption\n1_a.jpg,A dog , running .\n2.jpg,x\n".replace(" , ", " ")
    )
    assert read(tmp_path / "captions.txt") == [("1_a.jpg", "A dog running ."), ("2.jpg", "x")]
    (tmp_path / "results.csv").write_text(
        'image_name| comment_number| comment\n1.jpg| 0| Two "young" guys , with hair .\n1.jpg| 1| Two men .\n'
    )
    assert read(tmp_path / "results.csv") == [
        ("1.jpg", ' Two "young" guys , with hair .'),
        ("1.jpg", " Two men ."),
    ]
    (tmp_path / "flickr.token").write_text("1.jpg#0\tA man .\n1.jpg#1\tA person .\n")
    assert read(tmp_path / "flickr.token") == [("1.jpg", "A man ."), ("1.jpg", "A person .")]
    coco = {
        "info": {}, "images": [{"id": 1, "file_name": "0001.jpg"}, {"id": 2, "file_name": "0002.jpg"}],
        "annotations": [{"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "a"},
                        {"image_id": 2, "caption": "c"}],
    }  # fmt: skip
    (tmp_path / "captions_train2017.json").write_text(json.dumps(coco))
    assert read(tmp_path / "captions_train2017.json") == [(("0001.jpg",), ["a"]), (("0002.jpg",), ["b", "c"])]
    karpathy = {"images": [{"filename": "1.jpg", "filepath": "val2014", "split": "val",
                            "sentences": [{"raw": "a"}, {"raw": "b"}]}], "dataset": "coco"}  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(karpathy))
    assert read(tmp_path / "dataset.json") == [(("val2014/1.jpg", "1.jpg"), ["a", "b"])]
    (tmp_path / "wrapped.json").write_text(
        json.dumps({"version": 1, "data": [{"image": "a.jpg", "text": "x"}]})
    )
    assert read(tmp_path / "wrapped.json") == [("a.jpg", "x")]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not JSON"):
        read(tmp_path / "deep.json")


def test_numbers_of_json_stay_as_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"image": "a.jpg", "caption": 1.50}\nbroken\n{"image": "b.jpg", "caption": true}\n', "utf-8"
    )
    rows = read_text_table(path, Columns()).rows
    assert texts_of(rows[0][1]) == ["1.50"]
    assert (rows[1].reason, rows[1].name) == ("broken JSON", "row 1")
    assert texts_of(rows[2][1]) == ["true"]


def test_lists_saved_as_text_are_lists():
    import numpy

    words = ["cat", "it's", 'a "dog"']
    for text in (str(words), json.dumps(words), str(tuple(words)), str(numpy.array(words))):
        assert listed(text) == words
        assert nouns_from_value(text) == words
        assert texts_of(text) == words
    for text in ("[a photo]", "[1]", "(a, b)", "cat, dog", "[" * 5000, "[]x"):
        assert texts_of(text) == [text]
    assert nouns_from_value("cat, dog;cat|bird") == ["cat", "dog", "bird"]
    assert nouns_from_value(numpy.array(["a", "b"])) == ["a", "b"]
    assert nouns_from_value([b"caf\xc3\xa9", None, {"x": 1}]) == ["café"]


def test_objects_and_bytes_are_not_their_writing():
    assert texts_of({"raw": "a dog"}) == ["a dog"]
    assert texts_of({"x": 1}) == []
    assert texts_of(b"caf\xc3\xa9") == ["café"]
    assert texts_of(b"\xff\xfe\x00") == []
    assert texts_of([{"raw": "a"}, "b", None]) == ["a", "b"]


def picture(i: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (24, 20), (9 * i % 256, 100, 50)).save(out, "JPEG")
    return out.getvalue()


def test_paths_lie_inside_the_image_root(tmp_path):
    root = tmp_path / "im"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("000.jpg", "sub/a.JPG", "b.jpg")):
        (root / name).write_bytes(picture(i))
    (tmp_path / "secret.jpg").write_bytes(picture(5))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "own.jpg").symlink_to(root / "000.jpg")
    names = ["000", "sub\\a.JPG", "sub/a", " b.jpg ", "own.jpg", "link.jpg", "../secret.jpg",
             str(tmp_path / "secret.jpg"), "no\0name", "missing"]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"image": name, "text": "x"}) + "\n" for name in names))
    found = list(TableSource(path, Columns(), image_root=root).rows(0, len(names)))
    assert [None if isinstance(row, BadSample) else row.image for row in found] == [
        picture(0), picture(1), picture(1), picture(2), picture(0), None, None, None, None, None
    ]  # fmt: skip
    assert [row.reason for row in found if isinstance(row, BadSample)] == [
        *["path leads out of the image folder"] * 4,
        "unreadable file",
    ]
    followed = TableSource(path, Columns(), image_root=root, follow_links=True)
    assert next(followed.rows(5, 6)).image == picture(5)
    assert isinstance(next(followed.rows(6, 7)), BadSample)
    with pytest.raises(ValueError, match="--image-root"):
        TableSource(path, Columns(), image_root=tmp_path / "nowhere")


def test_the_digest_tells_content_from_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.csv").write_text("image,text\nx.jpg,one\n")
    first, second = (TableSource(tmp_path / name / "t.csv", Columns()).digest() for name in ("a", "b"))
    assert first == second
    (tmp_path / "b" / "t.csv").write_text("image,text\nx.jpg,two\n")
    assert TableSource(tmp_path / "b" / "t.csv", Columns()).digest() != first


@pytest.mark.parametrize("kind", ["csv", "paths.parquet", "bytes.parquet"])
def test_a_holdout_has_no_picture_of_the_training_part(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet
    from interloom.train.data.pairs.build import hold_out
    from interloom.train.data.pairs.sources import Columns, TableSource

    names = [f"{'./' * (row % 2)}{row // 5 % 20}.png" for row in range(200)]
    captions = [f"caption {row}" for row in range(200)]
    table = tmp_path / f"a.{kind}"
    if kind == "csv":
        lines = [f"{name},{caption}" for name, caption in zip(names, captions, strict=True)]
        table.write_text("image,caption\n" + "\n".join(lines) + "\n")
    else:
        image = [name.strip("./").encode() for name in names] if "bytes" in kind else names
        pyarrow.parquet.write_table(pyarrow.table({"image": image, "caption": captions}), table)
    train, val = hold_out(TableSource(table, Columns()), 0.3)
    assert sorted([*train.numbers, *val.numbers]) == list(range(200))
    pictures = [{row // 5 % 20 for row in part.numbers} for part in (train, val)]
    assert not pictures[0] & pictures[1]
    assert all(pictures)


def test_a_column_that_stands_twice_is_not_read_by_half(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,caption\na.png,first,second\n")
    with pytest.raises(ValueError, match="2 columns called 'caption'"):
        read_text_table(tmp_path / "t.csv", Columns())
