"""A run of one machine listens on loopback alone, and its ranks end with their agent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def descendants(process: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(processes: set[int]) -> set[str]:
    """Addresses, as the kernel writes them in hexadecimal, that processes accept TCP connections on."""
    sockets = set()
    for process in processes:
        try:
            for handle in Path(f"/proc/{process}/fd").iterdir():
                sockets.add(os.readlink(handle))
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.fixture
def run(tiny_world: Any, tmp_path: Path) -> Any:
    command = [str(Path(sys.executable).with_name("interloom")), "train", *tiny_world.overrides]
    command += ["name=loop", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    command += ["trainer.max_steps=100000", "callbacks.checkpoint.every_steps=0"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    yield process
    for number in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def until_training(process: subprocess.Popen[str], folder: Path) -> set[str]:
    """Wait for the second step; every address that was listened on meanwhile."""
    seen: set[str] = set()
    table = folder / "runs" / "loop" / "latest" / "metrics.csv"
    for _ in range(1200):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        seen |= listening(descendants(process.pid))
        if table.exists() and len(table.read_text().splitlines()) > 2:
            return seen
        time.sleep(0.1)
    raise AssertionError("no second step within two minutes")


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_ranks_listen_on_loopback_and_end_with_their_agent(run: Any, tmp_path: Path) -> None:
    seen = until_training(run, tmp_path)
    assert seen
    assert seen <= LOOPBACK
    ranks = descendants(run.pid) - {run.pid}
    assert len(ranks) >= 2
    run.send_signal(signal.SIGKILL)
    for _ in range(300):
        if not any(Path(f"/proc/{rank}").exists() for rank in ranks):
            return
        time.sleep(0.1)
    raise AssertionError("ranks outlive their agent by 30 seconds")


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_ray_without_a_cluster_listens_on_loopback(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from interloom.train.data.drawn.documents import write_tokenizer

    if Path("/tmp/ray/ray_current_cluster").exists():
        pytest.skip("a Ray cluster runs here")
    write_tokenizer(tmp_path / "tokenizer")
    record = json.dumps({"images": [None], "texts": ["some words of a document"]})
    (tmp_path / "a.jsonl").write_text(f"{record}\n" * 6)
    command = [str(Path(sys.executable).with_name("interloom")), "data", "obelics", "a.jsonl", "out"]
    command += ["--tokenizer", "tokenizer", "--no-filters", "--records-per-shard", "3", "--engine", "ray"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= listening(descendants(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    assert seen
    assert seen <= LOOPBACK
