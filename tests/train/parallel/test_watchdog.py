"""Which rank is blamed, and where its code stands."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from interloom.train.parallel.watchdog import BETWEEN, COMPUTING, Report, Watchdog, place_of, verdict


def report(step: int, phase: int = COMPUTING, *, waiting: bool = False, beat: int = 1) -> Report:
    return Report(step, phase, 30.0, "loader.py:7 in read", waiting, beat)


@pytest.mark.parametrize(
    ("reports", "silent", "said"),
    [
        # One that sends no more is blamed whatever it last said.
        (
            {0: report(5, waiting=True), 1: report(5)},
            [0],
            "rank 0 held the others up for 9 s (no sign of life",
        ),
        ({0: report(5, waiting=True), 1: None}, [], "rank 1 held the others up"),
        # The least progress: a step behind, or still reading while others compute.
        ({0: report(5), 1: report(4, waiting=True), 2: report(5)}, [], "rank 1 held"),
        ({0: report(5), 1: report(5, BETWEEN), 2: report(5)}, [], "rank 1 held"),
        # Equally far: those that do not wait in a collective.
        ({0: report(5, waiting=True), 1: report(5), 2: report(5, waiting=True)}, [], "rank 1 held"),
        ({0: report(5), 1: report(5), 2: report(5, waiting=True)}, [], "ranks 0, 1 held"),
        ({0: report(5), 1: report(5)}, [], "no progress for 9 s (all ranks are equally far)"),
    ],
)
def test_verdict(reports: dict[int, Report | None], silent: list[int], said: str) -> None:
    text = verdict(reports, silent, 9.0)
    assert text.startswith("stuck at step 5")
    assert said in text.splitlines()[0]
    assert "trainer.stuck_timeout" in text


def test_a_verdict_on_many_ranks_fits_a_screen() -> None:
    reports: dict[int, Report | None] = {rank: report(5, waiting=rank != 300) for rank in range(512)}
    lines = verdict(reports, [], 9.0).splitlines()
    assert lines[0].startswith("stuck at step 5: rank 300 held")
    assert "rank 300" in lines[1]
    assert "and 504 more ranks" in lines[-2]
    assert len(lines) < 12


def test_places_are_lines_of_ours_and_know_of_collectives() -> None:
    place, waiting = place_of(sys._getframe())
    assert "test_watchdog.py:" in place
    assert "in test_places" in place
    assert not waiting

    class Frame:
        def __init__(self, name: str, back: Any) -> None:
            self.f_code, self.f_back, self.f_lineno = self, back, 3
            self.co_filename, self.co_name = name, "work"

    ours = Frame("/x/objectives/training_step.py", None)
    assert place_of(Frame("/x/torch/distributed/c10d.py", ours)) == (
        "objectives/training_step.py:3 in work",
        True,
    )  # type: ignore[arg-type]
    assert place_of(Frame("/x/torch/nn/linear.py", ours)) == (
        "objectives/training_step.py:3 in work",
        False,
    )  # type: ignore[arg-type]


def run_watchdogs(advance: dict[int, bool], seconds: float) -> list[tuple[int, int]]:
    """Two ranks' watchdogs in this process; those that advance make a step every 20 ms. Who ended with what."""
    store = dist.HashStore()
    ended: list[tuple[int, int]] = []
    dogs = [Watchdog(store, r, 2, 0.4, end=lambda code, r=r: ended.append((r, code))) for r in range(2)]  # type: ignore[arg-type]
    for dog in dogs:
        dog.interval = 0.05
        dog.start()
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end and not ended:
        step += 1
        for rank, moves in advance.items():
            if moves:
                dogs[rank].mark(step, BETWEEN)
        time.sleep(0.02)
    for dog in dogs:
        dog.stop()
    assert not any(thread.name == "watchdog" and thread.is_alive() for thread in threading.enumerate())
    return ended


def test_nobody_is_ended_while_steps_come() -> None:
    assert run_watchdogs({0: True, 1: True}, 1.0) == []


def test_who_makes_no_step_ends(capsys: pytest.CaptureFixture[str]) -> None:
    (first, *_) = run_watchdogs({0: True, 1: False}, 5.0)
    assert first == (1, 1)
    assert "ERROR: rank 1: stuck at step" in capsys.readouterr().err
