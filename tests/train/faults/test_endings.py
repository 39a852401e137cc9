"""However a run with data workers ends, it ends: soon, with the right exit code, and with no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import World

LIMIT = 30.0

START = """
import os, sys, time
from interloom.train.cli import main

def fail(*_, **__):
    raise KeyError("broken on purpose")

def hang(*_, **__):
    time.sleep(3600)

{fault}
sys.exit(main(sys.argv[1:]))
"""

# What breaks, and what the exit code says of it.
FAULTS = {
    "a worker": """
from interloom.train.data.pairs import PairsFetch
real = PairsFetch.__call__
PairsFetch.__call__ = lambda self, positions: fail() if positions[0] >= 24 else real(self, positions)
""",
    "a step while workers hang": """
from interloom.train.data.pairs import PairsFetch
from interloom.train.module import TrainingModule
real_fetch, real_step = PairsFetch.__call__, TrainingModule.training_step
PairsFetch.__call__ = lambda self, p: hang() if p[0] >= 48 else real_fetch(self, p)
TrainingModule.training_step = lambda self, *a: fail() if self.global_step >= 3 else real_step(self, *a)
""",
    "a callback": """
from interloom.train.callbacks.metrics import MetricsCallback
MetricsCallback.on_train_batch_end = fail
""",
    "the evaluation at the end": """
import interloom.train.fit
interloom.train.fit.export = fail
sys.argv.append("trainer.max_steps=3")
""",
    "an import": """
sys.modules["interloom.train.groupvit_run"] = None
""",
}


class Run:
    """`interloom train` with two data workers in a session of its own."""

    def __init__(self, world: World, root: Path, fault: str = "", *extra: str) -> None:
        self.root = root
        self.log = root / "log"
        arguments = [*world.arguments(root, "data.workers=2", "trainer.max_steps=1000000", *extra)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(fault=fault), *arguments],
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def others(self) -> list[int]:
        """The processes of the session besides the first, zombies left out."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (OSError, ValueError):
                continue
            pid = int(entry.name) if entry.name.isdigit() else 0
            if fields[0] not in "ZX" and int(fields[3]) == self.process.pid != pid:
                found.append(pid)
        return found

    def wait_for_step(self, step: int) -> None:
        table = self.root / "run" / "latest" / "metrics.csv"
        end = time.monotonic() + 200
        while not table.exists() or table.read_text().count("\n") <= step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def end(self, limit: float = LIMIT) -> int:
        """The exit code; nothing may be left a moment later."""
        try:
            code = self.process.wait(limit)
            gone = time.monotonic() + 10
            while self.others() and time.monotonic() < gone:
                time.sleep(0.1)
            assert self.others() == []
            return code
        finally:
            if self.process.poll() is None or self.others():
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.mark.parametrize("where", FAULTS)
def test_an_exception_ends_the_run(groupvit: World, tmp_path: Path, where: str) -> None:
    run = Run(groupvit, tmp_path, FAULTS[where])
    code = run.end(limit=200)  # from a cold start; what hung, hung for ever
    assert code == 1, run.log.read_text()
    assert ("broken on purpose" in run.log.read_text()) == (where != "an import")


def test_a_killed_worker_is_one_sentence(groupvit: World, tmp_path: Path) -> None:
    run = Run(groupvit, tmp_path)
    run.wait_for_step(3)
    os.kill(run.others()[0], signal.SIGKILL)
    assert run.end() == 1, run.log.read_text()
    said = run.log.read_text()
    assert "Traceback" not in said
    assert "error: a data worker died (DataLoader worker (pid" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_workers_end_with_their_parent(groupvit: World, tmp_path: Path, number: int, code: int) -> None:
    run = Run(groupvit, tmp_path)
    run.wait_for_step(3)
    assert len(run.others()) >= 2
    run.process.send_signal(number)
    assert run.end() == code, run.log.read_text()


def test_builders_end_with_a_killed_build_and_the_next_one_sweeps(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    source, out = tmp_path / "pictures", tmp_path / "out"
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    for number in range(400):
        Image.fromarray(pixels).save(source / f"{number:03d}.png")
        (source / f"{number:03d}.txt").write_text("noise")
    arguments = ["data", "pairs", str(source), str(out), "--samples-per-shard", "40", "--workers", "2"]
    start = "import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start]
    process = subprocess.Popen([*command, *arguments], start_new_session=True)
    end = time.monotonic() + 200
    while not list(out.glob(".*.tmp")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    run = Run.__new__(Run)
    run.process = process
    gone = time.monotonic() + LIMIT
    while run.others() and time.monotonic() < gone:
        time.sleep(0.1)
    assert run.others() == []
    assert subprocess.run([*command, *arguments], check=False).returncode == 0
    assert sorted(path.suffix for path in out.glob(".*")) == []
    assert len(list(out.glob("*.tar"))) == 10


def test_a_small_dev_shm_is_one_sentence(groupvit: World, tmp_path: Path) -> None:
    probe = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"],
        capture_output=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("no right to mount a small /dev/shm: run as root")
    arguments = groupvit.arguments(tmp_path, "data.workers=2", "data.image_size=64", "trainer.max_steps=5")
    script = (
        'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" -c '
        '"import sys; from interloom.train.cli import main; sys.exit(main(sys.argv[1:]))" "$@"'
    )
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "data.workers=2 hand batches over in /dev/shm, which is full" in done.stderr
    assert "Traceback" not in done.stderr
