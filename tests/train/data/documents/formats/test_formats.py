"""Records as the tools of each format write them, and what becomes of them: tokens, masks and pixels by hand."""

import base64
import io
import json
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from interloom.train.cli import main
from interloom.train.data.documents.dataset import DocumentsConfig, documents_loader
from interloom.train.data.documents.formats import FORMATS
from interloom.train.data.documents.recognise import choose_format
from interloom.train.data.report import BadSample, SkipReport

from .conftest import IMAGE as I
from .conftest import E, F, answers, byte_tokenizer, documents, png, stored

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# As published: https://github.com/allenai/mmc4, "documents" section.
MMC4 = {
    "image_info": [
        {
            "face_detections": None, "image_name": "red.png", "matched_sim": 0.27,
            "matched_text_index": 2, "raw_url": "http://example.org/pics/red.png",
        },
        {
            "face_detections": None, "image_name": "green.png", "matched_sim": 0.31,
            "matched_text_index": 0, "raw_url": "http://example.org/pics/green.png",
        },
    ],
    "similarity_matrix": [[0.2, 0.1, 0.27], [0.31, 0.2, 0.1]],
    "text_list": ["First one.", "Then two.", "Last three."],
    "url": "http://example.org/page",
    "could_have_url_duplicate": 0,
}  # fmt: skip
# As LLaVA's instruction data: a list of samples with id, image and conversations.
LLAVA = {
    "id": "000000033471",
    "image": "red.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat colour?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
INSTRUCT = f"<s>User:{F}{I}{F}What colour?{E}\nAssistant: Red.{E}\nUser: Sure?{E}\nAssistant: Yes.{E}"


def address(colour):
    return "data:image/png;base64," + base64.b64encode(png(colour)).decode()


# As OpenAI's fine-tuning files: two user turns in a row, parts, a system turn, a weight.
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Describe it."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": address(BLUE), "detail": "low"}}],
        },
        {"role": "assistant", "content": "Blue.", "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "Again."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Still blue."}]},
    ]
}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("red", RED), ("green", GREEN), ("blue", BLUE)):
        (folder / f"{name}.png").write_bytes(png(colour))
    return folder


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def batch(folder, tokenizer, size=1, **settings):
    config = DocumentsConfig(
        sources={"made": [str(folder)]}, tokenizer=str(tokenizer), batch_size=size, workers=0, image_size=16,
        crop_scale=None, **settings,
    )  # fmt: skip
    return next(iter(documents_loader(config, max_steps=1)))


def ids_of(text, special):
    """By hand: special tokens by their place in the vocabulary, all else a byte a token."""
    from tokenizers import pre_tokenizers

    alphabet = {
        symbol: n + len(special) for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    # The printable bytes of ASCII stand for themselves, the blank for Ġ and the line break for Ċ.
    shown = {" ": "Ġ", "\n": "Ċ"}
    ids, place = [], 0
    while place < len(text):
        token = next((t for t in special if text.startswith(t, place)), None)
        ids.append(special.index(token) if token else alphabet[shown.get(text[place], text[place])])
        place += len(token or text[place])
    return ids


SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", F, I, E]


def test_mmc4_by_hand(tmp_path, instruct, pictures):
    source = lines(tmp_path / "docs_shard_0_v2.jsonl", MMC4)
    assert (
        documents(source, tmp_path / "out", instruct, "--image-root", pictures) == 2
    )  # the filters: short, few words
    assert not list((tmp_path / "out").glob("*.tar"))
    out = tmp_path / "all"
    assert documents(source, out, instruct, "--image-root", pictures, "--no-filters", "--format", "mmc4") == 0
    text = f"<s>{F}{I}{F}First one. Then two.{F}{I}{F}Last three.</s>"
    ((found, content, colours),) = stored(out)
    assert (found, colours) == (text, [GREEN, RED])
    assert content["ids"] == ids_of(text, SPECIAL)
    assert [image["src"] for image in content["images"]] == [
        "http://example.org/pics/green.png", "http://example.org/pics/red.png",
    ]  # fmt: skip
    # A window of one page is two sequences; the second begins with the first picture.
    made = batch(out, instruct, max_tokens=96, max_images=4, size=2)
    row = int(made["image_valid"].sum(1).argmax())
    ids, mask = made["input_ids"][row].tolist(), made["image_attention_mask"][row].numpy()
    assert made["input_ids"][1 - row, :2].tolist() == [1, 3]
    rest = content["ids"][1:]
    assert ids[: len(rest)] == rest
    first, second = (n for n, token in enumerate(ids) if token == 5)
    wanted = np.zeros((96, mask.shape[1]), bool)
    wanted[first:second, 0] = True
    wanted[second : len(rest), 1] = True
    np.testing.assert_array_equal(mask, wanted)
    assert made["labels"][row, 1 : len(rest)].tolist() == rest[1:]
    assert made["pixel_values"][row, :2, :, 3, 3].tolist() == [list(GREEN), list(RED)]


@pytest.mark.parametrize("way", ["base64", "bytes", "zip", "tar", "json text"])
def test_mmc4_however_its_pictures_come(tmp_path, instruct, pictures, way):
    record = json.loads(json.dumps(MMC4))
    for info, colour in zip(record["image_info"], (RED, GREEN), strict=True):
        info["image_base64"] = base64.b64encode(png(colour)).decode()
    source, options = tmp_path / "mmc4", []
    source.mkdir()
    if way == "base64":
        lines(source / "a.jsonl", record)
    elif way == "json text":
        lines(source / "a.jsonl", {**record, "image_info": json.dumps(record["image_info"])})
    elif way == "bytes":
        infos = [{**info, "bytes": png(c), "image_base64": None} for info, c in
                 zip(record["image_info"], (RED, GREEN), strict=True)]  # fmt: skip
        for info in infos:
            del info["face_detections"], info["image_base64"]
        table = {"text_list": [record["text_list"]], "image_info": [infos], "url": ["x"], "other": [1]}
        parquet.write_table(pa.table(table), source / "a.parquet")
    elif way == "zip":
        with zipfile.ZipFile(source / "docs_no_face_shard_0_v3.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("docs_no_face_shard_0_v3.jsonl", json.dumps(MMC4) + "\n")
        options = ["--image-root", pictures]
    else:
        write_tar(source / "000000.tar", {"a.json": json.dumps(record).encode()})
    out = tmp_path / "out"
    assert documents(source, out, instruct, "--no-filters", *options) == 0
    ((found, _, colours),) = stored(out)
    assert found == f"<s>{F}{I}{F}First one. Then two.{F}{I}{F}Last three.</s>"
    assert colours == [GREEN, RED]


def test_mmc4_through_the_guarded_fetcher(tmp_path, instruct, pictures):
    """The file where it is there, else the address, which is asked only if that is allowed."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(pictures)))
    Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    record = json.loads(json.dumps(MMC4))
    for info in record["image_info"]:
        info["raw_url"] = f"http://{host}/{info['image_name']}"
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "green.png").write_bytes(png(BLUE))  # what lies there counts
    source = lines(tmp_path / "a.jsonl", record)
    common = ["--no-filters", "--image-root", tmp_path / "some", "--fetch-deadline", "5"]
    try:
        allowed = [*common, "--fetch", "--fetch-allow-host", host]
        assert documents(source, tmp_path / "out", instruct, *allowed) == 0
        assert [colours for *_, colours in stored(tmp_path / "out")] == [[BLUE, RED]]
        for number, options in enumerate(([], ["--fetch"])):  # not asked for, and not a public address
            assert documents(source, tmp_path / str(number), instruct, *common, *options) == 0
            assert [colours for *_, colours in stored(tmp_path / str(number))] == [[BLUE]]
    finally:
        server.shutdown()
        server.server_close()


def write_tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_llava_by_hand(tmp_path, instruct, pictures):
    source = tmp_path / "llava_instruct.json"
    source.write_text(
        json.dumps([LLAVA, {**LLAVA, "id": "2", "image": None, "conversations": LLAVA["conversations"][2:]}])
    )
    out = tmp_path / "out"
    assert documents(source, out, instruct, "--image-root", pictures) == 0
    (first, content, colours), (second, _, _) = stored(out)
    assert (first, colours) == (INSTRUCT, [RED])
    assert second == f"<s>User: Sure?{E}\nAssistant: Yes.{E}"
    assert content["ids"] == ids_of(INSTRUCT, SPECIAL)
    assert answers(content) == [f" Red.{E}", f" Yes.{E}"]
    labels = batch(out, instruct, max_tokens=128, predict="answers")["labels"][0].tolist()
    wanted = [-100] * 128
    begin = 0
    for text in (INSTRUCT, second):
        ids, place = ids_of(text, SPECIAL), 0
        for part in text.split("Assistant:")[1:]:
            place = text.index("Assistant:" + part, place) + len("Assistant:")
            start = begin + len(ids_of(text[:place], SPECIAL))
            said = ids_of(part[: part.index(E) + len(E)], SPECIAL)
            wanted[start : start + len(said)] = said
        begin += len(ids)
    assert labels == wanted
    everything = batch(out, instruct, max_tokens=128)["labels"][0].tolist()
    assert sum(label >= 0 for label in everything) == begin - 2  # two documents, two first tokens


def test_messages_by_hand(tmp_path, instruct):
    out = tmp_path / "out"
    assert documents(lines(tmp_path / "train.jsonl", MESSAGES), out, instruct) == 0
    ((text, content, colours),) = stored(out)
    assert text == (
        f"<s>System: Be brief.{E}\nUser: Describe it.{E}\nUser:{F}{I}{F}{E}\nAssistant: Blue.{E}\nUser: Again.{E}\n"
        f"Assistant: Still blue.{E}"
    )
    assert colours == [BLUE]
    assert answers(content) == [f" Still blue.{E}"]  # the other's weight is 0


def test_messages_as_datasets_keeps_them(tmp_path, instruct):
    """The columns of trl's vision data sets: parts that name no picture, and ``images``."""
    part = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
    kind = pa.list_(pa.struct([("content", pa.list_(part)), ("role", pa.string())]))
    picture = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    turns = [
        {
            "role": "user",
            "content": [
                {"index": None, "text": "Which?", "type": "text"},
                {"index": 0, "text": None, "type": "image"},
            ],
        },
        {"role": "assistant", "content": [{"index": None, "text": "Green.", "type": "text"}]},
    ]
    table = pa.table({
        "messages": pa.array([turns], kind),
        "images": pa.array([[{"bytes": png(GREEN), "path": "a.png"}]], picture),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet", tmp_path / "out", instruct) == 0
    ((text, _, colours),) = stored(tmp_path / "out")
    assert (text, colours) == (f"<s>User: Which?{F}{I}{F}{E}\nAssistant: Green.{E}", [GREEN])


IMG2DATASET = {"caption": "a green field", "url": "http://example.org/g.jpg", "key": "000000000", "status": "success",
               "error_message": None, "width": 200, "height": 160, "exif": "{}", "sha256": "0"}  # fmt: skip


@pytest.mark.parametrize("layout", ["tar", "files", "csv", "jsonl", "parquet"])
def test_pairs_are_documents_of_one_image(tmp_path, instruct, layout):
    source, out = tmp_path / "pairs", tmp_path / "out"
    source.mkdir()
    if layout == "tar":
        members = {
            "000000000.json": json.dumps(IMG2DATASET).encode(),
            "000000000.png": png(GREEN),
            "000000000.txt": b"a green field",
        }
        write_tar(source / "00000.tar", members)
        (source / "00000_stats.json").write_text("{}")
        parquet.write_table(pa.table({"url": ["http://example.org/g.jpg"]}), source / "00000.parquet")
    elif layout == "files":
        (source / "000000000.png").write_bytes(png(GREEN))
        (source / "000000000.txt").write_text("a green field")
        (source / "000000000.json").write_text(json.dumps(IMG2DATASET))
    elif layout == "csv":
        (source / "g.png").write_bytes(png(GREEN))
        (source / "table.csv").write_text("filepath,title\ng.png,a green field\n")
        source = source / "table.csv"
    elif layout == "jsonl":
        lines(source / "a.jsonl", {"image": address(GREEN), "caption": "a green field", "n": 1})
    else:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        cells = pa.array([{"bytes": png(GREEN), "path": None}], kind)
        parquet.write_table(pa.table({"image": cells, "text": ["a green field"]}), source / "a.parquet")
    assert documents(source, out, instruct) == 0
    ((text, content, colours),) = stored(out)
    assert (text, colours) == (f"<s>{F}{I}{F}a green field</s>", [GREEN])
    assert content["texts"] == [None, "a green field"]


def test_plain_text(tmp_path, instruct):
    source = tmp_path / "wikipedia"
    source.mkdir()
    lines(
        source / "a.jsonl",
        {"id": "12", "url": "https://en.example.org/wiki/A", "title": "A", "text": "Words."},
    )
    assert choose_format("auto", str(source)).name == "text"
    assert documents(source, tmp_path / "out", instruct) == 0
    assert [text for text, *_ in stored(tmp_path / "out")] == ["<s>Words.</s>"]
    (tmp_path / "one.txt").write_text("More <image>words.")
    assert documents(tmp_path / "one.txt", tmp_path / "two", instruct) == 0
    assert [text for text, *_ in stored(tmp_path / "two")] == ["<s>More words.</s>"]


def test_the_alias_makes_the_same_bytes(tmp_path, instruct):
    record = {"images": [address(RED), None], "texts": [None, "words " * 12], "metadata": None}
    lines(tmp_path / "a.jsonl", record)
    call = [str(tmp_path / "a.jsonl"), "--tokenizer", str(instruct), "--workers", "1"]
    assert main(["data", "obelics", call[0], str(tmp_path / "one"), *call[1:]]) == 0
    assert main(["data", "documents", call[0], str(tmp_path / "two"), *call[1:], "--format", "obelics"]) == 0
    for name in ("000000.tar", "000000.idx", "manifest.json", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


SAMPLES = {
    "obelics": {"images": [None], "texts": ["a"], "metadata": None},
    "mmc4": MMC4,
    "llava": LLAVA,
    "messages": MESSAGES,
    "pairs": {"image": "a.png", "caption": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("given", SAMPLES)
def test_a_mistaken_format_is_refused_before_anything_is_written(tmp_path, instruct, given, capsys):
    source = lines(tmp_path / "a.jsonl", SAMPLES[given])
    assert choose_format("auto", str(source)).name == given
    for wanted in {*FORMATS} - {given}:
        if (wanted, given) == ("text", "pairs"):
            continue
        out = tmp_path / f"{wanted}-{given}"
        assert documents(source, out, instruct, "--format", wanted) == 2, wanted
        assert not out.exists()
        said = capsys.readouterr().err.strip()
        assert said.startswith("error: ")
        assert f"--format {given}" in said
        assert "\n" not in said


def test_an_unknown_format_is_one_sentence(tmp_path, instruct, capsys):
    source = lines(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    assert documents(source, tmp_path / "out", instruct) == 2
    assert "question, answer" in capsys.readouterr().err
    assert documents(source, tmp_path / "out", instruct, "--format", "flamingo") == 2
    assert "expected one of auto, obelics" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def bad_dialogues():
    human = {"from": "human", "value": "Hi."}
    gpt = {"from": "gpt", "value": "Ho."}
    yield "empty conversation", {"conversations": []}
    yield "empty conversation", {"conversations": [{"from": "system", "value": "Be kind."}]}
    yield "answer before a question", {"conversations": [gpt, human, gpt]}
    yield "conversation without an answer", {"conversations": [human]}
    yield "image that no text refers to", {"image": "red.png", "conversations": [human, gpt]}
    yield (
        "text that refers to an image that is not there",
        {"conversations": [{**human, "value": "<image>"}, gpt]},
    )
    yield "turn that says nothing", {"conversations": [human, {**gpt, "value": " "}]}
    yield "turn that says nothing", {"conversations": [{**human, "value": "<end_of_utterance>"}, gpt]}
    yield "turn without from and value", {"conversations": [{"from": "human", "value": None}, gpt]}
    yield (
        "role that is neither system, user nor assistant",
        {"conversations": [human, {**gpt, "from": "tool"}]},
    )
    yield (
        "answer that shows an image",
        {"image": "red.png", "conversations": [human, {**gpt, "value": "<image>"}]},
    )
    yield "dialogue that lost an image", {**LLAVA, "image": "missing.png"}


def test_bad_dialogues_are_counted_by_reason(tmp_path, instruct, pictures, capsys):
    cases = list(bad_dialogues())
    source = lines(tmp_path / "a.jsonl", LLAVA, *(record for _, record in cases))
    out = tmp_path / "out"
    assert documents(source, out, instruct, "--format", "llava", "--image-root", pictures) == 0
    assert [text for text, *_ in stored(out)] == [INSTRUCT]
    counts = {k: v["count"] for k, v in json.loads((out / "report.json").read_text())["reasons"].items()}
    for reason, _ in cases:
        assert counts[reason] == sum(reason == other for other, _ in cases), reason
    lines(tmp_path / "b.jsonl", *(record for _, record in cases))
    assert documents(tmp_path / "b.jsonl", tmp_path / "none", instruct, "--format", "llava") == 2
    assert not list((tmp_path / "none").glob("*.tar"))


def test_images_of_mmc4_that_no_text_refers_to_are_counted():
    for place in (None, 3, -1, "x", True, 0.5):
        record = json.loads(json.dumps(MMC4))
        record["image_info"][0]["matched_text_index"] = place
        report = SkipReport()
        document = FORMATS["mmc4"].read(record, "k", report)
        assert len(document.pictures) == 1
        assert report.counts == {"image that no text refers to": 1}
    with pytest.raises(BadSample, match="text_list"):
        FORMATS["mmc4"].read({**MMC4, "text_list": "abc"}, "k", None)


def test_special_tokens_in_what_people_say_do_not_count(tmp_path, instruct):
    turns = [
        {"from": "human", "value": f"a{E}\nAssistant: b<e<s>nd_of_utterance><ima</s>ge>"},
        {"from": "gpt", "value": "c"},
    ]
    assert documents(lines(tmp_path / "b.jsonl", {"conversations": turns}), tmp_path / "two", instruct) == 0
    ((text, content, _),) = stored(tmp_path / "two")
    assert text == f"<s>User: a\nAssistant: b{E}\nAssistant: c{E}"
    assert answers(content) == [f" c{E}"]


def test_a_tokenizer_without_turns_is_one_sentence(tmp_path, capsys):
    folder = byte_tokenizer(tmp_path / "plain", special=SPECIAL[:-1])
    assert documents(lines(tmp_path / "a.jsonl", LLAVA), tmp_path / "out", folder) == 2
    assert "neither a chat template nor the token <end_of_utterance>" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
