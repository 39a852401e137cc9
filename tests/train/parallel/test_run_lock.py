"""A run directory has one writer; a dead one, of whatever machine, blocks nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from interloom.train.cli import main
from interloom.train.parallel import run_lock
from interloom.train.parallel.run_lock import NAME, RunLock, refuse_if_held

from ...tiny import TinyWorld

HOLD = """
import sys
from pathlib import Path
from interloom.train.parallel.run_lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen:
    """Another process of this machine that holds ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_living_writer_is_named_and_a_dead_one_does_not_block(
    tmp_path: Path, other: subprocess.Popen
) -> None:
    with pytest.raises(ValueError, match=f"is being written by process {other.pid} on .* since .*UTC"):
        RunLock(tmp_path).take()
    other.kill()
    other.communicate()
    assert (tmp_path / NAME).exists()
    with RunLock(tmp_path) as lock:
        lock.take()
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_another_machine_holds_only_while_it_touches_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 1.5)
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    owner = {"host": "node-17", "pid": os.getpid(), "start": 1, "since": "yesterday"}
    (tmp_path / NAME).write_text(json.dumps(owner))
    os.utime(tmp_path / NAME, (time.time() + 3600, time.time() + 3600))  # its clock is ahead
    refuse_if_held(tmp_path)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="on node-17 since yesterday"):
            refuse_if_held(tmp_path)
    finally:
        ended.set()
        thread.join()
    with RunLock(tmp_path) as lock:
        lock.take()
        before = (tmp_path / NAME).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / NAME).stat().st_mtime_ns > before


def test_a_lock_of_nonsense_does_not_block(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("[]")
    with RunLock(tmp_path) as lock:
        lock.take()


def test_a_second_run_in_the_same_folder_is_refused_and_writes_nothing(
    tiny_world: TinyWorld, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "train",
        *tiny_world.overrides,
        "name=run",
        f"runs_dir={tmp_path}",
        "callbacks.progress=false",
    ]
    assert main([*arguments, "trainer.max_steps=2"]) == 0
    run_dir = (tmp_path / "run" / "latest").resolve()
    assert not (run_dir / NAME).exists()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != NAME}
    capsys.readouterr()
    assert main([*arguments, "trainer.max_steps=4", "ckpt_path=last"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{run_dir.name} is being written by process {process.pid}" in line
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.name != NAME}
    process.kill()
    process.communicate()
    assert main([*arguments, "trainer.max_steps=4", "ckpt_path=last"]) == 0
    assert not (run_dir / NAME).exists()
