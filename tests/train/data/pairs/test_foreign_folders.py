"""Folders, tables and saved data sets as other tools leave them: read whole, or said why not."""

import io
import json
import os

import numpy as np
import pytest
from interloom.train.data.pairs import build
from interloom.train.data.pairs.folders import FolderSource
from interloom.train.data.pairs.sources import open_source
from interloom.train.data.report import BadSample, SkipReport
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.data.shards.scan import scan_tar
from interloom.train.evaluation.groupvit.classification import image_folders
from interloom.train.evaluation.groupvit.labels import read_labels
from interloom.train.evaluation.groupvit.segmentation_data import decode_mask
from PIL import Image

from .foreign import index, make, pairs_of, picture, write_tar


def fill(folder, count=4, caption="a red ball"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture(i))
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption)


@pytest.mark.parametrize("name", ["txt", "TXT", "text", "caption", "json"])
def test_captions_beside_pictures(tmp_path, name):
    fill(tmp_path / "in", caption=None)
    text = json.dumps({"caption": "a ball", "nouns": ["ball"]}) if name == "json" else "\ufeffa ball"
    for i in range(4):
        (tmp_path / "in" / f"{i}.{name}").write_text(text, "utf-8")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert [captions for _, captions in pairs_of(tmp_path / "out")] == [["a ball"]] * 4


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_an_image_folder_of_datasets(tmp_path, capsys, form):
    import datasets
    import pandas

    root = tmp_path / "in"
    fill(root / "train", caption=None)
    rows = pandas.DataFrame([{"file_name": f"{i}.jpg", "text": f"caption {i}"} for i in (3, 1, 2, 0)])
    path = root / "train" / f"metadata.{form}"
    {"csv": lambda: rows.to_csv(path, index=False), "parquet": lambda: rows.to_parquet(path),
     "jsonl": lambda: rows.to_json(path, orient="records", lines=True)}[form]()  # fmt: skip
    theirs = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "c")
    )
    assert make(root, tmp_path / "out") == 0
    assert "4 pairs of 4 rows" in capsys.readouterr().out
    ours = dict(pairs_of(tmp_path / "out"))
    assert ours == {picture(row["image"].width - 24): [row["text"]] for row in theirs}
    (root / "train" / "9.jpg").write_bytes(picture(9))
    assert make(root, tmp_path / "out2", "--max-skip-rate", "0.5") == 0
    assert "1 × no row in the metadata table: train/9.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["files", "parquet", "webdataset"])
def test_layouts_of_img2dataset(tmp_path, layout):
    """As its writers leave them: a folder or file a shard, the metadata as Parquet beside, statistics as JSON."""
    import pandas
    import pyarrow as pa
    from pyarrow import parquet

    root, rows = tmp_path / "in", []
    for i in range(6):
        key = f"{i // 3:05d}{i % 3:04d}"
        meta = {"caption": f"row {i}", "url": f"https://example.com/{i}.jpg", "key": key,
                "status": "success" if i != 4 else "failed_to_download", "width": 24, "height": 20}  # fmt: skip
        rows.append(({"jpg": picture(i) if i != 4 else None, "txt": f"row {i}", **meta}, meta))
    for shard in range(2):
        part = rows[3 * shard : 3 * shard + 3]
        folder = root / f"{shard:05d}"
        folder.mkdir(parents=True)
        (root / f"{shard:05d}_stats.json").write_text('{"count": 3}')
        if layout == "parquet":
            parquet.write_table(pa.Table.from_pylist([row for row, _ in part]), root / f"{shard:05d}.parquet")
            continue
        pandas.DataFrame([meta for _, meta in part]).to_parquet(root / f"{shard:05d}.parquet")
        members = [(f"{m['key']}.{e}", d) for row, m in part if row["jpg"] for e, d in
                   (("jpg", row["jpg"]), ("txt", m["caption"].encode()), ("json", json.dumps(m).encode()))]  # fmt: skip
        if layout == "webdataset":
            write_tar(root / f"{shard:05d}.tar", members)
        else:
            for name, data in members:
                (folder / name).write_bytes(data)
    if layout == "webdataset":
        assert index(root) == 0
        out = root
    else:
        assert make(root, tmp_path / "out", "--max-skip-rate", "0.5") == 0
        out = tmp_path / "out"
    assert pairs_of(out) == [(picture(i), [f"row {i}"]) for i in range(6) if i != 4]


def test_saved_data_sets_give_names_of_classes(tmp_path):
    import datasets

    features = datasets.Features({
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["red", "blue"])),
    })  # fmt: skip
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(i), "path": None} for i in range(3)], "label": [1, 0, 1],
         "tags": [[0], [1, 0], []]}, features=features)  # fmt: skip
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "table.parquet")
    for source in ("saved", "table.parquet"):
        out = tmp_path / f"out-{source}"
        assert make(tmp_path / source, out, "--nouns", "column", "--nouns-column", "tags") == 0
        assert pairs_of(out) == [(picture(i), [name]) for i, name in enumerate(["dog", "cat", "dog"])]
        reader = ShardReader(ShardSet.open(out))
        assert [reader.read(i).json()["nouns"] for i in range(3)] == [["red"], ["blue", "red"], []]


def test_a_saved_data_set_reads_no_file_of_this_machine(tmp_path):
    import datasets

    (tmp_path / "secret.jpg").write_bytes(picture(1))
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.jpg")}], "text": ["x"]}
    )
    data.save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    (row,) = source.rows(0, 1)
    assert isinstance(row, BadSample)
    assert row.reason == "path leads out of the image folder"


def test_lists_of_captions_are_all_kept(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "p.jpg").write_bytes(picture(0))
    rows = [{"image": "p.jpg", "sentences": ["one", "two"]}, {"image": "p.jpg", "sentences": []},
            {"image": "p.jpg", "sentences": ["three"]}]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert make(tmp_path / "a.parquet", tmp_path / "out", "--max-skip-rate", "0.5") == 0
    assert [captions for _, captions in pairs_of(tmp_path / "out")] == [["one", "two"], ["three"]]


def test_what_a_folder_holds_besides_is_counted_by_reason(tmp_path, capsys, monkeypatch):
    root = tmp_path / "in"
    fill(root / "sub")
    fill(root / ".ipynb_checkpoints", 1)
    fill(root / "locked", 1)
    for name in ("x.bmp", "y.tif", "._0.jpg", "notes.txt", "noname"):
        (root / name).write_bytes(b"x")
    os.mkfifo(root / "pipe.jpg")
    walk = os.walk

    def locked(top, *arguments, onerror=None, **options):
        for folder, folders, files in walk(top, *arguments, onerror=onerror, **options):
            if "locked" in folders:
                folders.remove("locked")
                onerror(PermissionError(13, "Permission denied", os.path.join(folder, "locked")))
            yield folder, folders, files

    monkeypatch.setattr(os, "walk", locked)
    assert make(root, tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {reason: entry["names"] for reason, entry in report["reasons"].items()} == {
        "file not read (.bmp)": ["x.bmp"],
        "file not read (.tif)": ["y.tif"],
        "file not read": ["noname"],
        "hidden or system file": ["._0.jpg"],
        "hidden or system folder": [".ipynb_checkpoints"],
        "text without a picture": ["notes.txt"],
        "no file": ["pipe.jpg"],
        "unreadable folder": ["locked (Permission denied)"],
    }
    assert (report["seen"], report["skipped"]) == (4, 0)
    assert "4 pairs of 4 rows" in capsys.readouterr().out


def test_links_out_of_a_folder_are_followed_only_when_asked(tmp_path, capsys):
    outside, root = tmp_path / "outside", tmp_path / "in"
    fill(outside)
    (outside / "hostname").write_text("secret")
    fill(root, 2)
    (root / "1.txt").unlink()
    (root / "1.txt").symlink_to(outside / "hostname")
    (root / "own.jpg").symlink_to(root / "0.jpg")
    (root / "own.txt").symlink_to("0.txt")
    (root / "far.jpg").symlink_to(outside / "3.jpg")
    (root / "folder").symlink_to(outside)
    for loop in ("again", "more"):
        (root / loop).symlink_to(root)
    source = FolderSource(root, "sidecar")
    assert source.paths == ["0.jpg", "1.jpg", "own.jpg"]
    assert [row.reason for row in source.rows(0, 3) if isinstance(row, BadSample)] == ["no caption file"]
    assert source.unused.counts == {
        "link out of the folder, not followed": 2,
        "link to a folder, not followed": 3,
    }
    followed = FolderSource(root, "sidecar", follow_links=True)
    assert followed.paths == ["0.jpg", "1.jpg", "far.jpg", "own.jpg", *(f"folder/{i}.jpg" for i in range(4))]
    assert followed.unused.counts == {"link to a folder, not followed": 2, "file not read": 1}
    assert make(root, tmp_path / "out", "--captions", "sidecar", "--max-skip-rate", "0.4") == 0
    assert all("secret" not in captions[0] for _, captions in pairs_of(tmp_path / "out"))


def test_a_table_beside_pictures_is_not_passed_over_for_their_names(tmp_path, capsys):
    fill(tmp_path / "in" / "Images", caption=None)
    (tmp_path / "in" / "captions.txt").write_text(
        "image,caption\n0.jpg,a dog .\n0.jpg,one dog .\n1.jpg,a cat .\n"
    )
    assert make(tmp_path / "in", tmp_path / "out") == 2
    assert "captions.txt" in capsys.readouterr().err
    root = ["--image-root", str(tmp_path / "in" / "Images")]
    assert make(tmp_path / "in" / "captions.txt", tmp_path / "out", *root) == 0
    assert [captions for _, captions in pairs_of(tmp_path / "out")] == [
        ["a dog ."],
        ["one dog ."],
        ["a cat ."],
    ]


def test_a_lossy_build_is_refused_every_time_and_an_empty_one_always(tmp_path, capsys):
    fill(tmp_path / "in", 6)
    for i in (0, 2, 4):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"broken")
    for _ in range(2):
        assert make(tmp_path / "in", tmp_path / "out") == 2
        assert "3 of 6 samples were skipped" in capsys.readouterr().err
    for i in range(6):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"broken")
    for _ in range(2):
        assert make(tmp_path / "in", tmp_path / "none", "--max-skip-rate", "1") == 2
        assert "none of 6 rows became a pair" in capsys.readouterr().err


def test_two_builds_are_the_same_bytes(tmp_path):
    fill(tmp_path / "in", 12)
    for i in range(0, 12, 2):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(b"broken")
    for out, workers in (("a", 1), ("b", 2)):
        source = open_source(str(tmp_path / "in"))
        build.build_shards(source, tmp_path / out, build.BuildOptions(2), max_skip_rate=1, workers=workers)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert b"0x" not in (tmp_path / "a" / "report.json").read_bytes()


def test_holdouts_side_by_side_are_joined(tmp_path):
    for name in "ab":
        fill(tmp_path / f"in_{name}", 6)
        assert make(tmp_path / f"in_{name}", tmp_path / name, "--holdout", "0.3") == 0
    assert len(ShardSet.open([tmp_path / "a" / "train", tmp_path / "b" / "train"])) == 8


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("val/cat", "val/dog", "val/.ipynb_checkpoints", "val/__MACOSX", "val/cat/.hidden"):
        fill(tmp_path / name, 2, None)
    (tmp_path / "val" / "cat" / "._0.jpg").write_bytes(b"x")
    found, names = image_folders(tmp_path)
    assert (len(found), names) == (4, ["cat", "dog"])


def test_marks_of_byte_order_are_no_part_of_labels(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding=encoding)
        assert read_labels(tmp_path / "labels.txt") == ["cat", "dog"]
    (tmp_path / "labels.txt").write_bytes("café\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"not UTF-8 text \(it may be cp1252\)"):
        read_labels(tmp_path / "labels.txt")


def test_ids_of_masks_are_not_narrowed(tmp_path):
    def encoded(ids):
        out = io.BytesIO()
        Image.fromarray(ids).save(out, "PNG")
        return out.getvalue()

    small = np.array([[0, 1], [254, 255]], np.uint16)
    assert np.array_equal(decode_mask(encoded(small), "m"), small)
    with pytest.raises(ValueError, match="256"):
        decode_mask(encoded(np.array([[0, 256]], np.uint16)), "m")


def test_losses_are_no_samples_that_were_read(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("a.jpg", picture(0)), ("a.txt", "x"), ("b.jpg", picture(0)), ("c.cls", "1")]
    )
    entries, report = scan_tar(tmp_path / "a.tar", requires=(frozenset({"jpg"}), frozenset({"txt"})))
    assert (len(entries), report.seen, report.skipped) == (1, 2, 1)
    again = SkipReport.from_dict(report.to_dict())
    assert (again.skipped, again.notes) == (1, {"extension not allowed"})
