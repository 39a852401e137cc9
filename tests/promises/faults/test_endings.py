"""However a run with data workers ends, it ends: soon, with the right exit code, and with no process left."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from interloom.train.callbacks.metrics import MetricsCallback
from interloom.train.cli import main
from interloom.train.data.pairs.dataset import PairsFetch
from interloom.train.objectives.training_step import TrainingModule

from .conftest import World

LIMIT = 30.0
# Two of these start Python anew, which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(900)

Fault = Callable[[pytest.MonkeyPatch], object]


def fail(*_: object, **__: object) -> None:
    raise KeyError("broken on purpose")


def in_a_worker(patch: pytest.MonkeyPatch) -> None:
    real = PairsFetch.__call__
    patch.setattr(PairsFetch, "__call__", lambda self, p: fail() if p[0] >= 24 else real(self, p))


def in_a_step_while_workers_hang(patch: pytest.MonkeyPatch) -> None:
    fetch, step = PairsFetch.__call__, TrainingModule.training_step
    patch.setattr(PairsFetch, "__call__", lambda self, p: time.sleep(3600) if p[0] >= 48 else fetch(self, p))
    patch.setattr(
        TrainingModule, "training_step", lambda self, *a: fail() if self.global_step >= 3 else step(self, *a)
    )


FAULTS: dict[str, Fault] = {
    "a worker": in_a_worker,
    "a step while workers hang": in_a_step_while_workers_hang,
    "a callback": lambda patch: patch.setattr(MetricsCallback, "on_train_batch_end", fail),
    "the end": lambda patch: patch.setattr("interloom.train.fitting.export", fail),
    "an import": lambda patch: patch.setitem(sys.modules, "interloom.train.objectives.groupvit.build", None),
}


class Run:
    """`interloom train` with two data workers in a session of its own, forked from here, where all is imported."""

    def __init__(self, world: World, root: Path, fault: Fault = lambda patch: None, *extra: str) -> None:
        self.root = root
        self.log = root / "log"
        arguments = world.arguments(root, "data.workers=2", "trainer.max_steps=1000000", *extra)
        self.process = get_context("fork").Process(target=self._child, args=(arguments, fault))
        self.process.start()

    def _child(self, arguments: list[str], fault: Fault) -> None:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fault(pytest.MonkeyPatch())
        sys.exit(main(arguments))

    def others(self) -> list[int]:
        """The processes of the session besides the first, zombies left out."""
        return members(self.process.pid)

    def wait_for_step(self, step: int) -> None:
        table = self.root / "run" / "latest" / "metrics.csv"
        end = time.monotonic() + 400
        while not table.exists() or table.read_text().count("\n") <= step:
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def end(self, limit: float = LIMIT) -> int:
        """The exit code; nothing may be left a moment later."""
        try:
            self.process.join(limit)
            assert not self.process.is_alive(), f"no end:\n{self.log.read_text()}"
            gone = time.monotonic() + 10
            while self.others() and time.monotonic() < gone:
                time.sleep(0.1)
            assert self.others() == []
            assert self.process.exitcode is not None
            return self.process.exitcode
        finally:
            for pid in (self.process.pid, *self.others()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.join()


def members(session: int | None) -> list[int]:
    """The living processes of a session without its leader."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.name) if entry.name.isdigit() else 0
        if fields[0] not in "ZX" and int(fields[3]) == session != pid:
            found.append(pid)
    return found


@pytest.mark.parametrize("where", FAULTS)
def test_an_exception_ends_the_run(groupvit: World, tmp_path: Path, where: str) -> None:
    run = Run(groupvit, tmp_path, FAULTS[where], *(["trainer.max_steps=3"] if where == "the end" else []))
    assert run.end(limit=120) == 1, run.log.read_text()  # with the time to its third step; a hang had no end
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
    os.kill(run.process.pid or 0, number)
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
    end = time.monotonic() + 400
    while not list(out.glob(".*.tmp")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    gone = time.monotonic() + LIMIT
    while members(process.pid) and time.monotonic() < gone:
        time.sleep(0.1)
    assert members(process.pid) == []
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert "data.workers=2 hand batches over in /dev/shm, which is full" in done.stderr
    assert "Traceback" not in done.stderr
