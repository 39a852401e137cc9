"""Shards against the standard library's tarfile, and damaged ones against the rule: no loss without a report."""

import contextlib
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interloom.train.data.report import BadSample
from interloom.train.data.shards.index import ShardIndex, index_path, write_index
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.data.shards.scan import scan_tar
from interloom.train.data.shards.writer import ShardFile, ShardWriter, write_manifest


def content(i: int) -> dict[str, bytes]:
    generator = np.random.default_rng(i)
    return {
        "jpg": generator.bytes(200 + 700 * (i % 3)),
        "txt": f"caption {i}".encode(),
        "json": b'{"nouns": []}',
    }


def write(path, count=12, **options):
    with ShardFile(path, **options) as shard:
        for i in range(count):
            shard.add(f"sample{i:03d}", content(i), tokens=i, weight=i / 2)
    return path


def index_in_place(tar) -> dict:
    entries, report = scan_tar(tar, requires=(frozenset({"jpg"}), frozenset({"txt"})))
    write_index(tar, entries, size=os.path.getsize(tar), sha256="0" * 64, report=report)
    return report.to_dict()["reasons"]


def test_a_shard_is_a_tar_and_its_bytes_depend_on_the_samples_alone(tmp_path):
    first, second = write(tmp_path / "a.tar"), write(tmp_path / "deep" / "a.tar")
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "deep" / "a.idx").read_bytes()
    with tarfile.open(first) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert files == {f"sample{i:03d}.{e}": data for i in range(12) for e, data in content(i).items()}


def test_webdataset_reads_our_shards(tmp_path):
    from webdataset.compat import WebDataset

    tar = write(tmp_path / "a.tar")
    samples = list(WebDataset(str(tar), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [f"sample{i:03d}" for i in range(12)]
    assert [s["jpg"] for s in samples] == [content(i)["jpg"] for i in range(12)]


def test_reader_returns_what_was_written_across_shards(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=5) as writer:
        for i in range(12):
            writer.add(f"sample{i:03d}", content(i), tokens=i)
    shards = ShardSet.open(tmp_path)
    reader = ShardReader(shards)
    assert [s.samples for s in shards.shards] == [5, 5, 2]
    for i in (0, 4, 5, 11):
        record = reader.read(i)
        assert record.key == f"sample{i:03d}"
        assert {e: bytes(v) for e, v in record.members.items()} == content(i)
    assert shards.column("tokens", 3, 12).tolist() == list(range(3, 12))
    assert shards.tokens == sum(range(12))
    assert reader.read(3).text("txt") == "caption 3"


def test_remote_shards_read_like_local_ones(tmp_path):
    import fsspec

    with ShardWriter(tmp_path, samples_per_shard=5) as writer:
        for i in range(12):
            writer.add(f"sample{i:03d}", content(i))
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    shards = ShardSet.open("memory://bucket")
    assert shards.digests() == ShardSet.open(tmp_path).digests()
    records = ShardReader(shards).read_many(list(range(12)))
    assert [bytes(record.members["jpg"]) for record in records] == [content(i)["jpg"] for i in range(12)]


def test_scanning_a_foreign_tar_finds_the_same_members(tmp_path):
    ours = ShardIndex(index_path(write(tmp_path / "a.tar")))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / "foreign.tar"
        with tarfile.open(path, "w", format=form) as tar:
            directory = tarfile.TarInfo("x" * 60)
            directory.type = tarfile.DIRTYPE
            tar.addfile(directory)
            for i in range(12):
                for extension, data in content(i).items():
                    # A name longer than the header's field takes an extended header in every format.
                    info = tarfile.TarInfo(f"{'x' * 60}/{'y' * 60}/sample{i:03d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        entries, report = scan_tar(path)
        assert not report.skipped
        assert [e.key.rpartition("/")[2] for e in entries] == [ours.key(i) for i in range(12)]
        for i, entry in enumerate(entries):
            assert [(m.extension, m.length, m.crc32) for m in entry.members] == [
                (m.extension, m.length, m.crc32) for m in ours.members(i)
            ]


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="given, expected"), ShardFile(tmp_path / "a.tar") as shard:
        shard.add("a", {"exe": b"x"})
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_readers_would_not_read(tmp_path):
    with ShardFile(tmp_path / "a.tar") as shard:
        for key, members in (
            ("a", {"pyd": b""}),
            ("a.b", {"txt": b""}),
            ("", {"txt": b""}),
            ("a\n", {"txt": b""}),
        ):
            with pytest.raises(ValueError, match="given, expected"):
                shard.add(key, members)
        shard.add("a", {"txt": b""})
        with pytest.raises(ValueError, match="each once"):
            shard.add("a", {"txt": b""})


# --- damage -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 30_000))
def test_truncation_is_reported_when_indexing_and_when_reading(tmp_path, cut):
    tar = write(tmp_path / "a.tar")
    whole = tar.read_bytes()
    cut = cut % len(whole)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    tar.write_bytes(whole[:cut])
    reader = ShardReader(ShardSet.open(tar))  # still with the index of the whole shard
    lost = 0
    for i in range(12):
        try:
            assert bytes(reader.read(i).members["jpg"]) == content(i)["jpg"]
        except BadSample:
            lost += 1
    assert (lost > 0) == (cut < end - 512)
    entries, report = scan_tar(tar, requires=(frozenset({"jpg"}), frozenset({"txt"})))
    assert len(entries) == 12 or report.skipped


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bytes_never_pass_for_data_and_never_vanish(tmp_path, flips):
    tar = write(tmp_path / "a.tar")
    damaged = bytearray(tar.read_bytes())
    for place, change in flips:
        damaged[place % len(damaged)] ^= change
    tar.write_bytes(bytes(damaged))
    reader = ShardReader(ShardSet.open(tar))
    for i in range(12):
        with contextlib.suppress(BadSample):
            assert {e: bytes(v) for e, v in reader.read(i).members.items()} == content(i)
    entries, report = scan_tar(tar, requires=(frozenset({"jpg"}), frozenset({"txt"})))
    keys = [f"sample{i:03d}" for i in range(12)]
    assert set(keys) <= {e.key for e in entries} or report.skipped


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000), header=st.booleans())
def test_any_bytes_can_be_scanned(tmp_path, data, header):
    path = tmp_path / "noise.tar"
    block = tarfile.TarInfo("a.jpg")
    block.size = len(data)
    path.write_bytes((block.tobuf() if header else b"") + data)
    if data[:2] != b"\x1f\x8b":
        entries, report = scan_tar(path)
        assert entries or report.skipped


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1 << 20), change=st.integers(1, 255))
def test_a_damaged_index_is_refused_or_noticed(tmp_path, place, change):
    tar = write(tmp_path / "a.tar")
    index = tmp_path / "a.idx"
    damaged = bytearray(index.read_bytes())
    damaged[place % len(damaged)] ^= change
    index.write_bytes(bytes(damaged))
    try:
        reader = ShardReader(ShardSet.open(tar))
    except (ValueError, FileNotFoundError):
        return
    for i in range(12):
        try:
            record = reader.read(i)
        except BadSample:
            continue
        assert record.key == f"sample{i:03d}"
        assert {e: bytes(v) for e, v in record.members.items()} == content(i)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch executed",)


def hostile_tar(path):
    members = [
        ("good.jpg", b"1"), ("good.txt", b"one"),
        ("../../escape.jpg", b"2"), ("../../escape.txt", b"two"),
        ("/etc/absolute.jpg", b"3"), ("/etc/absolute.txt", b"three"),
        ("new\nline.jpg", b"4"), ("new\nline.txt", b"four"),
        ("pickled.pyd", pickle.dumps(Bomb())), ("pickled.jpg", b"5"), ("pickled.txt", b"five"),
        ("only.pickle", pickle.dumps(Bomb())), ("weights.pth", pickle.dumps(Bomb())),
        ("twice.jpg", b"6"), ("twice.txt", b"six"), ("twice.jpg", b"7"), ("twice.txt", b"seven"),
        ("textless.jpg", b"8"), ("imageless.txt", b"nine"),
        ("empty.jpg", b""), ("empty.txt", b""),
    ]  # fmt: skip
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind, name in (
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.FIFOTYPE, "fifo.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)


def test_hostile_members_are_counted_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile_tar(tmp_path / "a.tar")
    reasons = index_in_place(tmp_path / "a.tar")
    assert {reason: entry["count"] for reason, entry in reasons.items()} == {
        "hostile name": 6,
        "extension not allowed": 3,
        "duplicate key": 1,
        "incomplete sample": 2,
        "not a regular file": 3,
    }
    reader = ShardReader(ShardSet.open(tmp_path / "a.tar"))
    records = [reader.read(i) for i in range(len(reader.shards))]
    assert [(r.key, bytes(r.members["jpg"])) for r in records] == [
        ("good", b"1"), ("pickled", b"5"), ("twice", b"6"), ("twice", b"7"), ("empty", b""),
    ]  # fmt: skip
    assert not (tmp_path / "executed").exists()


def test_commands_are_no_sources():
    with pytest.raises(ValueError, match="never run"):
        ShardSet.open("pipe:cat shard.tar")


def test_missing_index_and_missing_shard_are_named_and_bounded(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.tar")
    write_manifest(tmp_path)
    (tmp_path / "1.idx").unlink()
    with pytest.raises(ValueError, match=r"12 of 48 .*missing index: 1\.tar.*--index-only"):
        ShardSet.open(tmp_path)
    shards = ShardSet.open(tmp_path, max_skip_rate=0.3)
    assert len(shards) == 36
    assert shards.report.counts == {"missing index": 1}
    (tmp_path / "2.tar").unlink()
    shards = ShardSet.open(tmp_path, max_skip_rate=0.6)
    assert shards.report.counts == {"missing index": 1, "missing shard": 1}
    with pytest.raises(FileNotFoundError, match="interloom data pairs"):
        ShardSet.open(tmp_path / "1.tar")
