"""A run that is killed and resumed ends with the weights of the uninterrupted run, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.train.checkpointing.folder import AtomicCheckpointIO, checkpoints_newest_first
from interloom.train.checkpointing.load import load_pretrained
from interloom.train.cli import main
from interloom.train.objectives.groupvit.objective import GroupViTModule
from interloom.train.objectives.training_step import TrainingModule

STEPS = 12


def arguments(world: Any, root: Path, workers: int, *extra: str) -> list[str]:
    return [
        "train",
        *world.overrides,
        "name=resume",
        f"runs_dir={root}",
        f"data.workers={workers}",
        f"trainer.max_steps={STEPS}",
        "trainer.micro_batch_size=4",
        "model.config.vision_config.drop_path_rate=0.2",
        "callbacks.checkpoint.every_steps=3",
        "optim.warmup_steps=2",
        "optim.ema_decay=0.8",
        *extra,
    ]


def in_child(arguments: list[str], during_save: int = 0) -> multiprocessing.process.BaseProcess:
    """Run the command in a forked process of its own group; it kills itself in its ``during_save``-th save."""

    def child() -> None:
        os.setsid()
        if during_save:
            saves = 0
            write = AtomicCheckpointIO.save_checkpoint

            def save(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
                nonlocal saves
                saves += 1
                if saves == during_save:
                    Path(path).with_name(f".{Path(path).name}.1.tmp").write_bytes(b"half a checkpoint")
                    os.kill(os.getpid(), signal.SIGKILL)
                write(self, checkpoint, path, storage_options)

            AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
        os._exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def signal_after(process: Any, root: Path, rows: int, *numbers: int) -> int:
    """Send the signals once ``metrics.csv`` has that many rows; the exit code."""
    table = root / "resume" / "latest" / "metrics.csv"
    while process.is_alive():
        if table.exists() and len(table.read_text().splitlines()) > rows:
            for number in numbers:
                os.kill(process.pid, number)
            break
        time.sleep(0.005)
    process.join()
    return process.exitcode


def weights(root: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint that training changed: model, temperatures, optimiser state, averages."""
    latest = root / "resume" / "latest"
    step, path = checkpoints_newest_first(latest / "checkpoints")[0]
    assert step == STEPS
    state = torch.load(path, weights_only=True)
    moments = {
        f"{index}.{name}": value
        for index, entry in state["optimizer_states"][0]["state"].items()
        for name, value in entry.items()
    }
    averages = {f"average of {name}": value for name, value in state["average"]["tensors"].items()}
    averages["updates"] = torch.tensor(state["average"]["updates"])
    exported, _ = load_pretrained(latest / "model")
    return {**state["state_dict"], **moments, **averages, **exported.state_dict()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("uninterrupted")
    assert main(arguments(tiny_world, root, 0)) == 0
    return weights(root)


@pytest.mark.parametrize(("workers", "rows"), [(0, 4), (2, 8)])
def test_killed_between_checkpoints(
    tiny_world: Any, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], workers: int, rows: int
) -> None:
    process = in_child(arguments(tiny_world, tmp_path, workers))
    assert signal_after(process, tmp_path, rows, signal.SIGKILL) == -signal.SIGKILL
    assert main(arguments(tiny_world, tmp_path, workers, "ckpt_path=last")) == 0
    assert_same(weights(tmp_path), uninterrupted)
    root = tmp_path / "resume"
    assert sorted(p.name for p in root.iterdir()) == sorted({"latest", os.readlink(root / "latest")})
    table = (root / "latest" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["step", *map(str, range(1, STEPS + 1))]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1,)])
def test_asked_to_stop(
    tiny_world: Any, tmp_path: Path, uninterrupted: dict[str, torch.Tensor], numbers: tuple[int, ...]
) -> None:
    settings = arguments(tiny_world, tmp_path, 2, "callbacks.checkpoint.every_steps=0")
    assert signal_after(in_child(settings), tmp_path, 4, *numbers) == 143
    ((step, _),) = checkpoints_newest_first(tmp_path / "resume" / "latest" / "checkpoints")
    assert 4 <= step < STEPS
    assert not (tmp_path / "resume" / "latest" / "model").exists()
    assert main(arguments(tiny_world, tmp_path, 0, "ckpt_path=last")) == 0
    assert_same(weights(tmp_path), uninterrupted)


def test_killed_while_saving_and_then_twice_resumed(
    tiny_world: Any, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    for _ in range(2):  # dies in its second save each time, one checkpoint further
        process = in_child(arguments(tiny_world, tmp_path, 0, "ckpt_path=last"), during_save=2)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert [s for s, _ in checkpoints_newest_first(tmp_path / "resume" / "latest" / "checkpoints")] == [6, 3]
    assert main(arguments(tiny_world, tmp_path, 0, "ckpt_path=last")) == 0
    assert_same(weights(tmp_path), uninterrupted)
    assert not list((tmp_path / "resume" / "latest" / "checkpoints").glob(".*"))


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    tiny_world: Any,
    tmp_path: Path,
    uninterrupted: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(tiny_world, tmp_path, 0)) == 0
    newest = checkpoints_newest_first(tmp_path / "resume" / "latest" / "checkpoints")[0][1]
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert main(arguments(tiny_world, tmp_path, 0, "ckpt_path=last")) == 0
    assert "is damaged" in capsys.readouterr().err
    assert_same(weights(tmp_path), uninterrupted)


def test_last_without_a_checkpoint_starts_afresh_and_says_so(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny_world, tmp_path, 0, "ckpt_path=last", "trainer.max_steps=1")) == 0
    assert "starting afresh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed=0"),
        ("data.batch_size=16", "global batch of 8"),
        ("model.multi_label=0", "do not fit"),
        ("data.shuffle=false", "changed since the checkpoint"),
    ],
)
def test_resuming_something_else_is_refused(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert main(arguments(tiny_world, tmp_path, 0, "trainer.max_steps=1")) == 0
    before = sorted(p.name for p in (tmp_path / "resume").iterdir())
    capsys.readouterr()
    assert main(arguments(tiny_world, tmp_path, 0, "ckpt_path=last", change)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert sorted(p.name for p in (tmp_path / "resume").iterdir()) == before


def test_the_loss_scale_of_float16_is_resumed(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first gradients overflow; then the scale grows every second step.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**13, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    settings = ("trainer.precision=16-mixed", "callbacks.checkpoint.keep=9", "trainer.nonfinite_limit=30")

    def scales(root: Path) -> dict[int, dict[str, Any]]:
        kept = checkpoints_newest_first(root / "resume" / "latest" / "checkpoints")
        return {step: torch.load(path, weights_only=True)["ScaledPrecision"] for step, path in kept}

    assert main(arguments(tiny_world, tmp_path / "whole", 0, *settings)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "on_train_batch_start", stop_in(7), raising=False)
        assert main(arguments(tiny_world, tmp_path / "parts", 0, *settings)) == 143
    assert main(arguments(tiny_world, tmp_path / "parts", 0, "ckpt_path=last", *settings)) == 0
    wanted, found = scales(tmp_path / "whole"), scales(tmp_path / "parts")
    assert len({state["scale"] for state in wanted.values()}) > 1
    assert {state["_growth_tracker"] for state in found.values()} == {0, 1}
    assert {step: found[step] for step in wanted} == wanted
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_run_stopped_before_any_step_changed_a_weight_goes_on(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = GroupViTModule.backward_step

    def not_finite_at_first(self: Any, batch: Any, step: int) -> Any:
        metrics = whole(self, batch, step)
        return metrics if step >= 2 else {**metrics, "loss": metrics["loss"] * torch.nan}

    monkeypatch.setattr(GroupViTModule, "backward_step", not_finite_at_first)
    assert main(arguments(tiny_world, tmp_path / "whole", 0)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "on_train_batch_start", stop_in(1), raising=False)
        assert main(arguments(tiny_world, tmp_path / "parts", 0)) == 143
    assert main(arguments(tiny_world, tmp_path / "parts", 0, "ckpt_path=last")) == 0
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def stop_in(step: int) -> Any:
    def on_train_batch_start(self: TrainingModule, *_: Any) -> None:
        if self.trainer.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_train_batch_start


def forge(path: Path, change: str) -> None:
    """Write a checkpoint that holds something else than training left there."""
    state = torch.load(path, weights_only=True)
    progress = "epoch_loop.manual_optimization.optim_step_progress"
    if change.startswith("step"):
        step = int(change.removeprefix("step "))
        state["interloom"]["step"] = state["global_step"] = step
        state["loops"]["fit_loop"][progress]["total"]["completed"] = step
    elif change == "no loops":
        del state["loops"]
    elif change == "other loops":
        state["loops"]["fit_loop"][progress]["total"]["completed"] = 1
    elif change == "empty optimiser":
        state["optimizer_states"] = [{"state": {}, "param_groups": []}]
    elif change == "no optimiser":
        del state["optimizer_states"]
    elif change == "odd counts":
        state["interloom"]["counts"]["nonfinite_steps"] = -1
    elif change == "no seed":
        del state["interloom"]["seed"]
    torch.save(state, path)


def test_a_resumed_state_that_cannot_be_is_refused_by_name(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny_world, tmp_path, 0, "trainer.max_steps=3")) == 0
    (_, whole), *_ = checkpoints_newest_first(tmp_path / "resume" / "latest" / "checkpoints")
    for change, words in {
        f"step {10**18}": "step 1000000000000000000",
        "step -5": "step -5",
        "no loops": "training loop",
        "other loops": "contradicts itself",
        "empty optimiser": "empty optimiser",
        "no optimiser": "optimizer_states",
        "odd counts": "has not made",
        "no seed": "seed",
    }.items():
        forged = tmp_path / "forged.ckpt"
        forged.write_bytes(whole.read_bytes())
        forge(forged, change)
        capsys.readouterr()
        assert main(arguments(tiny_world, tmp_path, 0, f"ckpt_path={forged}", "trainer.max_steps=6")) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert words in line, change
