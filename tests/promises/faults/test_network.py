"""Whole runs over HTTP and S3, through every fault: the bits of a run on local shards, or one sentence."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.train.cli import main
from safetensors.torch import load_file

from ...faulty_server import FaultyServer
from .conftest import World

STEPS = 6


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("interloom.train.data.shards.remote._FIRST_PAUSE", 0.05)


def arguments(world: World, root: Path, source: str, *extra: str) -> list[str]:
    given = [a for a in world.arguments(root) if not a.startswith("data.train=")]
    return [*given, f"data.train=[{source}]", f"trainer.max_steps={STEPS}", "data.workers=1", *extra]


def bits(root: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    latest = root / "run" / "latest"
    rows = (latest / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    return load_file(latest / "model" / "model.safetensors"), [row.split(",")[column] for row in rows]


@pytest.fixture(scope="module")
def shards(groupvit: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the tiny world with a manifest, as a remote folder has one."""
    import shutil

    from interloom.train.data.shards.writer import write_manifest

    folder = tmp_path_factory.mktemp("remote") / "train"
    shutil.copytree(groupvit.data, folder)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(groupvit: World, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("local")
    assert main(arguments(groupvit, root, str(shards))) == 0
    return bits(root)


def assert_same(root: Path, wanted: Any) -> None:
    found, curve = bits(root)
    assert curve == wanted[1]
    assert [name for name in wanted[0] if not torch.equal(found[name], wanted[0][name])] == []


@pytest.mark.parametrize(
    "fault", ["none", "500", "503", "403", "404", "reset", "truncated", "short", "refused"]
)
def test_a_run_over_http_has_the_bits_of_a_local_one(
    groupvit: World, tmp_path: Path, shards: Path, wanted: Any, fault: str
) -> None:
    server = FaultyServer(shards.parent)
    answer, served = server.answer, 0

    def counted(handler: Any) -> None:
        # The fault comes in the middle of training: after the start and some samples.
        nonlocal served
        served += handler.path.endswith(".tar")
        if served == 20:
            if fault == "refused":
                threading.Thread(target=server.stop).start()
                threading.Timer(2.0, server.start).start()
            elif fault != "none":
                server.fail(fault, failures=12)
        answer(handler)

    server.answer = counted  # type: ignore[method-assign]
    try:
        assert main(arguments(groupvit, tmp_path, f"{server.url}/train")) == 0
    finally:
        server.stop()
    assert_same(tmp_path, wanted)


def test_a_server_that_stays_away_ends_the_run_with_one_sentence(
    groupvit: World, tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = FaultyServer(shards.parent)
    answer, served = server.answer, 0

    def counted(handler: Any) -> None:
        nonlocal served
        served += handler.path.endswith(".tar")
        if served == 30:
            server.fail("403")
        answer(handler)

    server.answer = counted  # type: ignore[method-assign]
    source = f"http://me:SECRET@127.0.0.1:{server.port}/train"
    try:
        assert main(arguments(groupvit, tmp_path, source, "data.retry_seconds=2", "data.workers=2")) == 1
    finally:
        server.stop()
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "error:" in line]
    assert f"http://***@127.0.0.1:{server.port}/train/000000.tar cannot be read (HTTP 403)" in line
    assert "Traceback" not in said
    assert "SECRET" not in said


class FaultyBuckets:
    """Moto's S3 on loopback; the next ``failures`` requests for shards meet ``fault``."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.fault, self.failures, self.after = "", 0, 1 << 60
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].endswith(".tar") and environ["REQUEST_METHOD"] == "GET":
            self.after -= 1
            if self.after < 0 < self.failures:
                self.failures -= 1
                if self.fault == "reset":
                    connection = environ["werkzeug.socket"]
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
                    return []
                if self.fault == "truncated":
                    body = b"".join(self.app(environ, start))
                    return [body[: len(body) // 2]]
                start(f"{self.fault} Failed", [("Content-Length", "0")])
                return []
        return self.app(environ, start)


@pytest.fixture(scope="module")
def buckets(shards: Path) -> Iterator[FaultyBuckets]:
    pytest.importorskip("s3fs", reason="needs interloom[s3]")
    pytest.importorskip("moto", reason="needs moto[server]")
    import boto3

    server = FaultyBuckets()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        for file in shards.iterdir():
            client.upload_file(str(file), "data", f"train/{file.name}")
        yield server
    server.server.shutdown()


@pytest.mark.parametrize("fault", ["none", "500", "503", "403", "reset", "truncated"])
def test_a_run_over_s3_has_the_bits_of_a_local_one(
    groupvit: World, tmp_path: Path, buckets: FaultyBuckets, wanted: Any, fault: str
) -> None:
    buckets.fault, buckets.failures, buckets.after = fault, 0 if fault == "none" else 12, 20
    assert main(arguments(groupvit, tmp_path, "s3://data/train")) == 0
    assert buckets.failures == 0
    assert_same(tmp_path, wanted)


def test_a_bucket_without_the_shards_is_one_sentence(
    groupvit: World, tmp_path: Path, buckets: FaultyBuckets, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(groupvit, tmp_path, "s3://data/none", "data.retry_seconds=0.5")) in {1, 2}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "s3://data/none" in line
