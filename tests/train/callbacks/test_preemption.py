"""Ctrl-C: saved, said, exit code 130; a second one quits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from interloom.train.callbacks import preemption
from interloom.train.callbacks.preemption import PreemptionCallback
from interloom.train.checkpointing.folder import checkpoints_newest_first
from interloom.train.parallel.stop_requests import INTERRUPT, StopRequests


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_world: Any, tmp_path: Path) -> None:
    arguments = [*tiny_world.overrides, "name=it", "trainer.max_steps=100000"]
    run = subprocess.Popen(
        [sys.executable, "-m", "interloom.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        table = tmp_path / "runs" / "it" / "latest" / "metrics.csv"
        deadline = time.monotonic() + 200
        while not (table.exists() and table.read_text().count("\n") > 2):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == 130, said
    ((step, _),) = checkpoints_newest_first(table.parent / "checkpoints")
    assert f"stopped on request at step {step}, saved" in said
    command = said.strip().splitlines()[-1]
    assert command.startswith("  interloom train ")
    assert command.endswith("name=it trainer.max_steps=100000 ckpt_path=last")
    assert "Traceback" not in said


def test_one_press_and_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ended, said = [100.0], [], []
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(preemption.os, "_exit", ended.append)
    monkeypatch.setattr(preemption, "_write", said.append)
    requests = StopRequests()
    callback = PreemptionCallback(requests)
    callback._interrupt(signal.SIGINT, None)
    now[0] += 0.2  # the same press, from the agent that passes it on
    callback._interrupt(signal.SIGINT, None)
    assert requests.asked == INTERRUPT
    assert ended == []
    assert len(said) == 1
    now[0] += 2.0
    callback._interrupt(signal.SIGINT, None)
    assert ended == [130]
    assert "without saving" in said[1]


def test_a_run_stops_saved_when_its_time_is_over(tiny_world, tmp_path, monkeypatch, capsys):
    from interloom.train.callbacks import preemption
    from interloom.train.checkpointing.folder import checkpoints_newest_first
    from interloom.train.cli import main

    clock = iter(range(0, 10**6, 10))  # ten seconds pass from one look to the next
    monkeypatch.setattr(preemption.time, "monotonic", lambda: next(clock))
    run = ["train", *tiny_world.overrides, "name=x", f"runs_dir={tmp_path}", "trainer.max_steps=50"]
    assert main([*run, "trainer.max_time=00:00:01:00"]) == 143
    ((step, _),) = checkpoints_newest_first(tmp_path / "x" / "latest" / "checkpoints")
    assert 1 <= step < 10
    assert "ckpt_path=last" in capsys.readouterr().err
    for wrong in ("12", "1:00:00", "00:00:00:00", "aa:00:00:01"):
        assert main([*run, f"trainer.max_time='{wrong}'"]) == 2
        assert "DD:HH:MM:SS" in capsys.readouterr().err
