"""Asked to stop, or killed: the resumed run is the uninterrupted one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interloom.train.checkpointing.folder import AtomicCheckpointIO, checkpoints_newest_first

from .conftest import STEPS, World, assert_same_run, resume, train

Reference = Callable[..., Path]


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGTERM, (0,)), (signal.SIGTERM, (1,)), (signal.SIGTERM, ()), (signal.SIGUSR1, (1,))],
    ids=["SIGTERM to 0", "SIGTERM to 1", "SIGTERM to all", "SIGUSR1 to 1"],
)
def test_asked_to_stop(
    world: World, tmp_path: Path, uninterrupted: Reference, number: int, asked: tuple[int, ...]
) -> None:
    extra = ["callbacks.checkpoint.every_steps=0", "data.workers=1"]
    job = train(world, tmp_path, *extra)
    job.wait_for_step(4)
    job.send(number, *asked)
    begun = time.monotonic()
    assert job.finish() == [143, 143], job.said()
    assert time.monotonic() - begun < 30
    ((step, _),) = checkpoints_newest_first(job.latest / "checkpoints")
    assert 4 <= step < STEPS
    assert job.said().count("stopped on request") == 1
    resume(world, tmp_path, *extra)
    assert_same_run(tmp_path, uninterrupted(world, *extra))


def test_more_signals_while_it_stops(world: World, tmp_path: Path, uninterrupted: Reference) -> None:
    job = train(world, tmp_path, "callbacks.checkpoint.every_steps=0")
    job.wait_for_step(3)
    while any(process.is_alive() for process in job.processes):
        job.send(signal.SIGTERM, 0)
        job.send(signal.SIGUSR1, 1)
        time.sleep(0.002)
    # Past the save, at the very end of its process, a signal may do what signals do.
    assert all(code in {143, -signal.SIGTERM, -signal.SIGUSR1} for code in job.finish()), job.said()
    assert checkpoints_newest_first(job.latest / "checkpoints")
    resume(world, tmp_path)
    assert_same_run(tmp_path, uninterrupted(world))


def test_asked_before_the_first_step(groupvit: World, tmp_path: Path, uninterrupted: Reference) -> None:
    from interloom.train.callbacks.preemption import PreemptionCallback

    def fault(rank: int) -> None:
        listen = PreemptionCallback.listen

        def ask(self: Any) -> None:
            listen(self)
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)

        PreemptionCallback.listen = ask  # type: ignore[method-assign]

    job = train(groupvit, tmp_path, fault=fault)
    assert job.finish() == [143, 143], job.said()
    resume(groupvit, tmp_path)
    assert_same_run(tmp_path, uninterrupted(groupvit))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(world: World, tmp_path: Path, uninterrupted: Reference, seed: int) -> None:
    """Up to three times, each time somebody else, then left alone."""
    draw = random.Random(f"{world.objective} {seed}")
    codes: list[list[int]] = []
    for _ in range(3):
        job = train(world, tmp_path, "ckpt_path=last", f"data.workers={seed % 2}")
        job.wait_for_step(draw.randrange(1, STEPS))
        time.sleep(draw.uniform(0, 0.1))
        job.send(signal.SIGKILL, *draw.choice([(0,), (1,), ()]))
        codes.append(job.finish())
        if codes[-1] == [0, 0]:
            break
    assert any(-signal.SIGKILL in each for each in codes), codes
    resume(world, tmp_path)
    assert_same_run(tmp_path, uninterrupted(world))


@pytest.mark.parametrize("when", ["before the rename", "after the rename"])
def test_killed_while_saving(world: World, tmp_path: Path, uninterrupted: Reference, when: str) -> None:
    def fault(rank: int) -> None:
        saves = 0
        write = AtomicCheckpointIO.save_checkpoint

        def save(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            nonlocal saves
            saves += 1
            if saves == 2 and when == "before the rename":
                Path(path).with_name(f".{Path(path).name}.1.tmp").write_bytes(b"half a checkpoint")
                signal.raise_signal(signal.SIGKILL)
            write(self, checkpoint, path, storage_options)
            if saves == 2:
                signal.raise_signal(signal.SIGKILL)

        AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]

    job = train(world, tmp_path, fault=fault)
    assert -signal.SIGKILL in job.finish(), job.said()
    newest = checkpoints_newest_first(job.latest / "checkpoints")[0][0]
    assert newest == (3 if when == "before the rename" else 6)
    resume(world, tmp_path)
    assert_same_run(tmp_path, uninterrupted(world))
    assert not list((job.latest / "checkpoints").glob(".*"))
