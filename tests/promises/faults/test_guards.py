"""What is not finite, stuck, slow or full: nothing wrong is learned, nothing is waited for without end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.train.checkpointing.folder import checkpoints_newest_first

from .conftest import EVERY, STEPS, STRATEGIES, World, assert_same_run, resume, small_disk, train

Reference = Callable[..., Path]


def on_step(act: Callable[[Any, int, dict[str, Any]], None]) -> None:
    """Call ``act(module, step, metrics)`` after the backward pass of every step of this process."""
    from interloom.train.objectives.groupvit.objective import GroupViTModule
    from interloom.train.objectives.idefics.objective import IdeficsModule

    for kind in (GroupViTModule, IdeficsModule):
        whole = kind.backward_step

        def backward_step(self: Any, batch: Any, step: int, whole: Any = whole) -> dict[str, torch.Tensor]:
            metrics = whole(self, batch, step)
            act(self, step, metrics)
            return metrics

        kind.backward_step = backward_step  # type: ignore[method-assign]


def not_finite(what: str, steps: set[int]) -> Callable[[int], None]:
    """A fault of rank 1: its loss, or one number of its gradient, is not finite at these steps."""

    def fault(rank: int) -> None:
        def act(module: Any, step: int, metrics: dict[str, torch.Tensor]) -> None:
            if rank != 1 or step not in steps:
                return
            if what == "loss":
                metrics["loss"] = torch.full_like(metrics["loss"], float("nan"))
            else:
                gradient = next(p.grad for p in module.parameters() if p.grad is not None)
                gradient.view(-1)[0] = float("inf")

        on_step(act)

    return fault


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_on_one_rank(world: World, tmp_path: Path, uninterrupted: Reference, what: str) -> None:
    fault = not_finite(what, {4, 7})
    reference = uninterrupted(world, fault=fault, tag=what)
    lines = [
        json.loads(line) for line in (reference / "run/latest/skipped_steps.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["rank"]) for line in lines] == [(4, 0), (4, 1), (7, 0), (7, 1)]
    assert all(len(line["keys"]) == 4 for line in lines)
    assert len({key for line in lines[:2] for key in line["keys"]}) == 8
    job = train(world, tmp_path, fault=fault)
    job.wait_for_step(6)
    job.send(signal.SIGKILL, 0)
    job.finish()
    resume(world, tmp_path, fault=fault)
    assert_same_run(tmp_path, reference)


def test_not_finite_for_too_long(world: World, tmp_path: Path, uninterrupted: Reference) -> None:
    job = train(world, tmp_path, "trainer.nonfinite_limit=3", fault=not_finite("loss", set(range(7, STEPS))))
    assert job.finish() == [2, 2], job.said()
    assert "not finite for 3 steps in a row, up to step 9" in job.said()
    # The checkpoint of step 9 holds two steps that changed nothing; the one before is from sound steps alone.
    checkpoints = checkpoints_newest_first(job.latest / "checkpoints")
    assert [step for step, _ in checkpoints] == [9, 6]
    resume(world, tmp_path, f"ckpt_path={checkpoints[1][1]}")
    assert_same_run(tmp_path, uninterrupted(world))


@pytest.mark.parametrize(("stuck", "how"), [(0, "asleep"), (1, "asleep"), (1, "stopped")])
def test_a_rank_that_hangs_is_named(
    world: World, tmp_path: Path, uninterrupted: Reference, stuck: int, how: str
) -> None:
    def fault(rank: int) -> None:
        def act(module: Any, step: int, metrics: dict[str, torch.Tensor]) -> None:
            if rank == stuck and step == 5:
                if how == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1000)

        on_step(act)

    job = train(world, tmp_path, "trainer.stuck_timeout=3", fault=fault)
    codes = job.finish()
    assert codes[1 - stuck] == 1, job.said()
    said = job.log(1 - stuck).read_text()
    assert f"stuck at step 5: rank {stuck} held the others up for 3 s" in said
    if how == "asleep":
        assert f"rank {stuck}: computing at step 5" in said
        assert "in act" in said  # the line that sleeps
        assert f"rank {1 - stuck}: waiting in a collective" in said
    else:
        assert "no sign of life" in said
    resume(world, tmp_path)
    assert_same_run(tmp_path, uninterrupted(world))


def test_a_slow_rank_is_waited_for(groupvit: World, tmp_path: Path, uninterrupted: Reference) -> None:
    def fault(rank: int) -> None:
        def act(module: Any, step: int, metrics: dict[str, torch.Tensor]) -> None:
            if rank == 1:
                time.sleep(1.5 if step == 5 else 0.2)

        on_step(act)

    job = train(groupvit, tmp_path, "trainer.stuck_timeout=3", fault=fault)
    job.wait_for_step(3)
    job.send(signal.SIGTERM, 0)  # agreed upon although the ranks are apart
    assert job.finish() == [143, 143], job.said()
    resume(groupvit, tmp_path, "trainer.stuck_timeout=3", fault=fault)
    assert_same_run(tmp_path, uninterrupted(groupvit))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_disk(world: World, tmp_path: Path, uninterrupted: Reference, strategy: str) -> None:
    """The disk fills up after the first checkpoint, and is freed once the run has given up at its end."""
    root = tmp_path / "disk"
    with small_disk(root, 24):
        filler = root / "filler"

        def fault(rank: int) -> None:
            def act(module: Any, step: int, metrics: dict[str, torch.Tensor]) -> None:
                if rank == 0 and step == EVERY + 1:
                    with open(filler, "wb", buffering=0) as file:
                        try:
                            while True:
                                file.write(bytes(65536))
                        except OSError:
                            pass

            on_step(act)

        job = train(world, root, strategy=strategy, fault=fault)
        codes = job.finish()
        filler.unlink()
        said = job.said()
        assert codes == [2, 2], said
        assert "No space left on device" in said
        assert f"step-{EVERY:08d}" in said  # what is intact
        ((step, _),) = checkpoints_newest_first(job.latest / "checkpoints")
        assert step == EVERY
        resume(world, root, strategy=strategy)
        assert_same_run(root, uninterrupted(world, strategy=strategy))
