"""Disks that are full or read-only: one sentence with the path, exit 2, what was there stays and nothing else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.train.cli import main
from PIL import Image
from safetensors.torch import load_file

from ...faulty_server import FaultyServer
from .conftest import World, small_disk


def sentence(said: str) -> str:
    assert "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    return line


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    import os

    free = os.statvfs(folder)
    filler = folder / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return filler


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that cannot be written, not by root either."""
    bound = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
    if bound.returncode:
        pytest.skip("no right to mount: run this suite as root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for number in range(60):
        pixels = draws.integers(0, 255, (150, 150, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text("noise")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_building_on_a_full_disk(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    arguments = ["--samples-per-shard", "10", "--workers", str(workers)]
    assert main(["data", "pairs", str(pictures), str(tmp_path / "whole"), *arguments]) == 0
    disk = tmp_path / "disk"
    with small_disk(disk, 2.0):
        out = disk / "out"
        capfd.readouterr()
        assert main(["data", "pairs", str(pictures), str(out), *arguments]) == 2
        line = sentence(capfd.readouterr().err)
        assert "No space left on device" in line
        assert re.search(rf"cannot write {out}/00000\d\.(tar|idx), [\d,]+ bytes are needed", line)
        built = sorted(path.name for path in out.iterdir())
        assert built
        assert all(name.endswith((".tar", ".idx")) for name in built)
        for name in built:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert (out / name).with_suffix(".idx").exists()


def test_exporting_and_converting_on_a_full_disk(
    groupvit: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model that was there stays."""
    assert main(groupvit.arguments(tmp_path, "trainer.max_steps=2")) == 0
    run = (tmp_path / "run" / "latest").resolve()
    disk = tmp_path / "disk"
    with small_disk(disk, 2.0):
        assert main(["convert", str(run), str(disk / "model")]) == 0
        before = load_file(disk / "model" / "model.safetensors")
        names = sorted(path.name for path in (disk / "model").iterdir())
        filler = fill(disk, leave=8192)
        capfd.readouterr()
        assert main(["convert", str(run), str(disk / "model"), "--overwrite"]) == 2
        line = sentence(capfd.readouterr().err)
        assert f"cannot write {disk}/model/model.safetensors" in line
        assert "bytes are needed" in line
        assert sorted(path.name for path in (disk / "model").iterdir()) == names
        found = load_file(disk / "model" / "model.safetensors")
        assert all(torch.equal(found[name], before[name]) for name in before)
        filler.unlink()


def test_a_checkpoint_is_not_begun_where_it_does_not_fit(
    groupvit: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 4.0):
        assert main(groupvit.arguments(disk, "trainer.max_steps=3")) == 0
        run = (disk / "run" / "latest").resolve()
        fill(disk, leave=60_000)
        begun: list[str] = []
        monkeypatch.setattr("torch.save", lambda *_, **__: begun.append("saved"))
        capfd.readouterr()
        assert main(groupvit.arguments(disk, "ckpt_path=last", "trainer.max_steps=4")) == 2
        line = sentence(capfd.readouterr().err)
        assert re.search(
            r"cannot write .*step-00000004\.ckpt, [\d,]+ bytes are needed, [\d,]+ are free", line
        )
        assert "step-00000003.ckpt is intact" in line
        assert not begun
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003.ckpt"]


def test_a_read_only_run_folder(groupvit: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    with read_only(tmp_path / "runs"):
        capfd.readouterr()
        assert main(groupvit.arguments(tmp_path / "runs", "trainer.max_steps=2")) == 2
        line = sentence(capfd.readouterr().err)
        assert f"cannot write {tmp_path}/runs/run/" in line
        assert "the file system is read-only" in line
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_read_only_cache(
    groupvit: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = FaultyServer(groupvit.data.parent)
    source = f"data.train=[{server.url}/{groupvit.data.name}/000000.tar]"
    try:
        with read_only(tmp_path / "cache"):
            capfd.readouterr()
            assert main([*groupvit.arguments(tmp_path), source, "trainer.max_steps=2"]) == 2
        line = sentence(capfd.readouterr().err)
        assert f"cannot write {tmp_path}/cache/interloom/indexes" in line
    finally:
        server.stop()
