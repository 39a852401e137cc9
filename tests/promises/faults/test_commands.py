"""The same through the real launchers: the plain command's torchrun, and submitit's processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import World, assert_same_run, several

Reference = Callable[..., Path]
CODE = "import sys; from interloom.train.cli import main; sys.exit(main())"


def start(world: World, root: Path, *extra: str) -> subprocess.Popen[str]:
    """The plain command, as a user types it, in a process group of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    command = [sys.executable, "-c", CODE, *world.arguments(root, *several(2), *extra)]
    return subprocess.Popen(command, env=clean, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(root: Path, step: int) -> None:
    table = root / "run" / "latest" / "metrics.csv"
    end = time.monotonic() + 200
    while not (table.exists() and len(table.read_text().splitlines()) > step):
        assert time.monotonic() < end
        time.sleep(0.01)


def ranks_of(agent: int) -> list[int]:
    """Process ids of the ranks that an agent started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_the_plain_command_is_stopped_four_times(
    groupvit: World, tmp_path: Path, uninterrupted: Reference
) -> None:
    """Each time by another signal to somebody else, with the exit code and the words that belong to it."""
    interruptions = [
        (2, "agent", signal.SIGUSR1, 143),
        (4, "agent", signal.SIGTERM, 143),
        (6, "rank 1", signal.SIGTERM, 143),
        (8, "rank 1", signal.SIGKILL, 1),
    ]
    for step, whom, number, code in interruptions:
        process = start(groupvit, tmp_path, "ckpt_path=last")
        wait_for_step(tmp_path, step)
        begun = time.monotonic()
        os.kill(process.pid if whom == "agent" else ranks_of(process.pid)[1], number)
        _, said = process.communicate(timeout=100)
        assert process.returncode == code, said
        assert time.monotonic() - begun < 30
        if code == 143:
            assert "stopped on request at step" in said
        else:
            assert "rank 1 was killed by signal 9" in said
            assert "ckpt_path=last continues" in said
    process = start(groupvit, tmp_path, "ckpt_path=last")
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert_same_run(tmp_path, uninterrupted(groupvit))


def test_what_the_user_got_wrong_ends_the_plain_command_with_2(groupvit: World, tmp_path: Path) -> None:
    process = start(groupvit, tmp_path, "data.train=[nowhere]")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert "nowhere" in said
    assert not (tmp_path / "run").exists()


def test_a_sweep_through_submitit(groupvit: World, tmp_path: Path) -> None:
    """Two settings at once, each on two ranks with a run directory of its own."""
    pytest.importorskip("submitit")
    settings = groupvit.arguments(tmp_path, *several(2), "trainer.max_steps=2", "seed=1,2")
    command = [sys.executable, "-c", CODE, "train", "-m", "hydra/launcher=submitit_local", *settings[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    logs = "\n".join(p.read_text() for p in (tmp_path / "sweeps").rglob("*.err"))
    assert done.returncode == 0, done.stderr + logs
    runs = [path for path in (tmp_path / "run").iterdir() if not path.is_symlink()]
    assert len(runs) == 2
    assert all((run / "model" / "model.safetensors").exists() for run in runs)
    seeds = {
        line for run in runs for line in (run / "config.yaml").read_text().splitlines() if "seed:" in line
    }
    assert seeds == {"seed: 1", "seed: 2"}
