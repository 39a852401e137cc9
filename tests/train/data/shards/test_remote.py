"""Remote shards: the same batches through every fault that passes, one sentence for one that does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interloom.train.data.pairs.dataset import PairsConfig, pairs_loader
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.data.shards.remote import AddressError, masked, open_address, retries
from interloom.train.data.shards.writer import ShardWriter
from interloom.train.messages import OutsideFault

from ....faulty_server import FAULTS, FaultyServer


def png(seed: int) -> bytes:
    import io

    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def build(folder: Path, seed: int = 0, samples: int = 12) -> Path:
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for row in range(samples):
            members = {"png": png(seed + row), "txt": f"caption {seed + row}".encode(), "json": b"{}"}
            writer.add(f"{row:05d}", members)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("interloom.train.data.shards.remote._FIRST_PAUSE", 0.02)
    instance = FaultyServer(folder.parent)
    retries.take()
    yield instance
    instance.stop()


def batches(source: str, retry_seconds: float = 30, workers: int = 0) -> list[dict]:
    config = PairsConfig(
        train=[source], image_size=16, batch_size=4, workers=workers, retry_seconds=retry_seconds
    )
    loader = pairs_loader(config, split="train", seed=3, rank=0, world_size=1, start_step=0, max_steps=5)
    found = list(loader)
    found.append({"retried": loader.retried, "skipped": loader.summary().skipped})
    return found


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    for one, two in zip(found[:-1], wanted[:-1], strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert (one["captions"], one["keys"]) == (two["captions"], two["keys"])
    assert found[-1]["skipped"] == 0


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[dict]:
    return batches(str(folder))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_no_bit_and_is_counted(
    folder: Path, server: FaultyServer, fault: str
) -> None:
    shards = ShardSet.open(f"{server.url}/train")
    reader, local = ShardReader(shards), ShardReader(ShardSet.open(str(folder)))
    assert retries.take() == 0
    server.fail(fault, failures=1 if fault == "damaged" else 3)
    for sample in range(len(shards)):
        assert reader.read(sample).members == local.read(sample).members
    assert server.failures == 0
    # Damage is seen by the checksum and asked for once more; the client itself replaces a connection that was reset.
    assert retries.take() in {"damaged": {0}, "reset": {1, 2, 3}}.get(fault, {3})


@pytest.mark.parametrize("suffix", ["manifest.json", ".idx", ".tar"])
@pytest.mark.parametrize("fault", ["500", "403", "reset", "truncated"])
def test_a_fault_at_the_start_passes_too(
    server: FaultyServer, wanted: list[dict], fault: str, suffix: str
) -> None:
    server.fail(fault, failures=3, suffix=suffix)
    assert_same(batches(f"{server.url}/train"), wanted)
    assert server.failures == 0


def test_a_server_that_is_away_at_the_start_and_later(server: FaultyServer, wanted: list[dict]) -> None:
    url = f"{server.url}/train"
    server.stop()
    threading.Timer(0.5, server.start).start()
    found = batches(url)
    assert_same(found, wanted)
    assert retries.take() + found[-1]["retried"] > 0


def test_a_server_without_ranges(server: FaultyServer, wanted: list[dict]) -> None:
    server.ranges = False
    assert_same(batches(f"{server.url}/train"), wanted)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_fault_that_stays_is_one_sentence_with_the_address(
    server: FaultyServer, fault: str, workers: int
) -> None:
    url = f"http://user:SECRET@127.0.0.1:{server.port}/train"
    config = PairsConfig(train=[url], image_size=16, batch_size=4, workers=workers, retry_seconds=0.4)
    loader = pairs_loader(config, split="train", seed=3, rank=0, world_size=1, start_step=0, max_steps=5)
    server.fail(fault)
    begun = time.monotonic()
    with pytest.raises(
        OutsideFault, match=r"^http://\*\*\*@127\.0\.0\.1:\d+/train/00000\d\.tar cannot"
    ) as caught:
        list(loader)
    assert time.monotonic() - begun < 20
    assert "SECRET" not in str(caught.value)
    assert "data.retry_seconds" in str(caught.value)


def test_a_listed_shard_that_is_not_there_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = build(tmp_path / "data" / "train")
    server = FaultyServer(folder.parent)
    (folder / "000001.tar").unlink()
    try:
        with pytest.raises(
            ValueError, match=r"train/000001\.tar is in the manifest .* the server has it not"
        ):
            ShardSet.open(f"{server.url}/train", max_skip_rate=0.9)
        with open(folder / "000002.tar", "r+b") as file:
            file.truncate(1024)
        (folder / "000001.tar").write_bytes(b"0" * (1 << 20))
        with pytest.raises(ValueError, match="shorter than the"):
            ShardSet.open(f"{server.url}/train", max_skip_rate=0.0)
    finally:
        server.stop()


@pytest.mark.parametrize("listed", [True, False])
def test_replaced_data_are_not_read_by_an_old_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Samples of the same sizes, so that only their digests differ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "data"
    folder = build(root / "train", seed=0, samples=4)
    server = FaultyServer(root)
    source = f"{server.url}/train" + ("" if listed else "/000000.tar")
    try:
        for seed in (0, 50):
            if seed:
                for file in folder.iterdir():
                    file.unlink()
                build(folder, seed=seed, samples=4)
            reader = ShardReader(ShardSet.open(source))
            assert reader.read(0).members["txt"] == f"caption {seed}".encode()
        server.requests.clear()
        ShardSet.open(source)
        # A listed index that is cached costs no request; of another its header alone is compared.
        assert server.requests["000000.idx"] == (0 if listed else 1)
        for file in (tmp_path / "cache" / "interloom" / "indexes").iterdir():
            file.write_bytes(file.read_bytes()[:-10])  # a copy that was damaged
        if listed:
            assert ShardReader(ShardSet.open(source)).read(0).members["txt"] == b"caption 50"
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["index_sha256"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if listed:
            with pytest.raises(ValueError, match="not the index that the manifest"):
                ShardSet.open(source, max_skip_rate=0.0)
    finally:
        server.stop()


def test_indexes_are_fetched_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server a tenth of a second away: 60 shards take two requests each, 12 s one after the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ShardWriter(tmp_path / "data" / "train", samples_per_shard=1) as writer:
        for row in range(60):
            writer.add(f"{row:05d}", {"txt": b"a caption"})
    server = FaultyServer(tmp_path / "data")
    answer = server.answer

    def slowly(handler: Any) -> None:
        time.sleep(0.1)
        answer(handler)

    monkeypatch.setattr(server, "answer", slowly)
    begun = time.monotonic()
    try:
        assert len(ShardSet.open(f"{server.url}/train")) == 60
    finally:
        server.stop()
    assert time.monotonic() - begun < 5


def test_addresses_are_shown_without_their_secrets() -> None:
    assert masked("https://me:word@host/a/b.tar?X-Amz-Signature=abc") == "https://***@host/a/b.tar?…"
    assert masked("s3://bucket/key.tar") == "s3://bucket/key.tar"


def test_a_read_only_cache_is_one_sentence(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises((ValueError, OSError), match=str(tmp_path / "file")):
        ShardSet.open(f"{server.url}/train", max_skip_rate=0.0)


def test_an_address_of_an_unknown_kind_is_refused_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"carrier://pigeon/000000\.idx is no address that fsspec reads"):
        ShardSet.open("carrier://pigeon/000000.tar")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("scheme", ["gs", "gcs"])
def test_googles_addresses_are_known_and_their_extra_is_named_where_it_lacks(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from fsspec.registry import known_implementations

    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    assert known_implementations[scheme]["class"].startswith("gcsfs.")
    with pytest.raises(AddressError, match=r"pip install|install interloom\[gs\]") as caught:
        open_address(f"{scheme}://bucket/cc3m/train")
    assert "bucket" in str(caught.value)
