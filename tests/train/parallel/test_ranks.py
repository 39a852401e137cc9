"""Two ranks do what one process does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interloom.train.checkpointing.folder import checkpoints_newest_first
from interloom.train.cli import main
from interloom.train.objectives.groupvit.objective import GroupViTModule
from interloom.train.parallel.gradients import average_gradients
from interloom.train.parallel.sync_batch_norm import SyncBatchNorm1d, synchronise_batch_norm
from torch import nn

STEPS = 6


def test_batch_statistics_and_gradients_span_the_ranks(
    fork_ranks: Callable[..., None], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Far from zero: a plain sum of squares would cancel here. Shares of unequal size, too.
    rows = torch.randn(12, 5, generator=generator) * 0.1 + 30.0
    weight = torch.randn(12, 5, generator=generator)

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))

    def work(rank: int) -> None:
        dist.init_process_group("gloo")
        model = synchronise_batch_norm(build())
        assert isinstance(model, nn.Sequential)
        assert type(model[1]) is SyncBatchNorm1d
        share = slice(0, 4) if rank == 0 else slice(4, 12)
        for _ in range(2):
            output = model(rows[share])
        # Parts are averaged over ranks, so each is the derivative times their number.
        (2 * (output * weight[share]).sum()).backward()
        average_gradients(model.parameters())
        grads = {name: p.grad for name, p in model.named_parameters()}
        torch.save((model.state_dict(), grads, output.detach()), tmp_path / f"{rank}.pt")

    fork_ranks(work, 2)
    model = build().double()
    for _ in range(2):
        output = model(rows.double())
    (output * weight.double()).sum().backward()
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    found = torch.cat([states[0][2], states[1][2]])
    torch.testing.assert_close(found.double(), output.detach(), rtol=1e-3, atol=1e-3)
    for state, grads, _ in states:
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name].to(value.dtype), value, rtol=1e-4, atol=1e-5, msg=name)
        for name, parameter in model[1].named_parameters(prefix="1"):
            torch.testing.assert_close(grads[name].double(), parameter.grad, rtol=1e-3, atol=2e-3, msg=name)


def arguments(world: Any, root: Path, *extra: str) -> list[str]:
    return [
        "train",
        *world.overrides,
        "name=ranks",
        f"runs_dir={root}",
        f"trainer.max_steps={STEPS}",
        "model.config.vision_config.drop_path_rate=0.2",
        "optim.clip_norm=1.0",
        # A bias before batch norm has no gradient but rounding, which Adam would blow up to the full rate.
        "optim.eps=1e-4",
        *extra,
    ]


def outcome(root: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    import csv

    latest = root / "ranks" / "latest"
    step, path = checkpoints_newest_first(latest / "checkpoints")[0]
    assert step == STEPS
    with open(latest / "metrics.csv") as file:
        return torch.load(path, weights_only=True)["state_dict"], list(csv.DictReader(file))


@pytest.fixture(scope="module")
def one_process(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("one")
    assert main(arguments(tiny_world, root)) == 0
    return outcome(root)


@pytest.mark.parametrize("micro_batch", ["null", "3"])
def test_two_ranks_train_like_one_process(
    fork_ranks: Callable[..., None], tiny_world: Any, tmp_path: Path, one_process: Any, micro_batch: str
) -> None:
    settings = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    settings.append(f"trainer.micro_batch_size={micro_batch}")

    def work(rank: int) -> None:
        assert main(arguments(tiny_world, tmp_path, *settings)) == 0

    fork_ranks(work, 2)
    weights, curve = one_process
    found, table = outcome(tmp_path)
    for mine, theirs in zip(curve, table, strict=True):
        assert float(theirs["train/loss"]) == pytest.approx(float(mine["train/loss"]), rel=1e-5)
    # The norm after it takes this bias out again: its gradient, too, is rounding alone.
    weights = {name: value for name, value in weights.items() if not name.endswith("mlp_inter.fc2.bias")}
    far = {name: float((found[name] - value).abs().max()) for name, value in weights.items()}
    assert max(far.values()) < 1e-5, sorted(far.items(), key=lambda item: -item[1])[:5]
    # One run directory for both.
    assert len([p for p in (tmp_path / "ranks").iterdir() if not p.is_symlink()]) == 1


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_stops_both_with_a_checkpoint(
    fork_ranks: Callable[..., None], tiny_world: Any, tmp_path: Path, asked: int
) -> None:
    settings = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=100000"]

    def work(rank: int) -> None:
        if rank == asked:
            table = tmp_path / "ranks" / "latest" / "metrics.csv"

            def wait_and_ask() -> None:
                while not (table.exists() and len(table.read_text().splitlines()) > 3):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=wait_and_ask, daemon=True).start()
        assert main(arguments(tiny_world, tmp_path, *settings)) == 143

    fork_ranks(work, 2)
    ((step, _),) = checkpoints_newest_first(tmp_path / "ranks" / "latest" / "checkpoints")
    assert 3 <= step < 100000


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    fork_ranks: Callable[..., None], tiny_world: Any, tmp_path: Path
) -> None:
    settings = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]

    def work(rank: int) -> None:
        whole = GroupViTModule.backward_step

        def backward_step(self: Any, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
            metrics = whole(self, batch, step)
            if step >= 2 and rank == 1:
                self.model.visual_projection[0].weight.grad[0, 0] = float("nan")
            return metrics

        GroupViTModule.backward_step = backward_step  # type: ignore[method-assign]
        settings.append("callbacks.checkpoint.every_steps=1")
        assert main(arguments(tiny_world, tmp_path, *settings, "trainer.nonfinite_limit=3")) == 2

    fork_ranks(work, 2)
    latest = tmp_path / "ranks" / "latest"
    (_, newest), (_, before) = checkpoints_newest_first(latest / "checkpoints")
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (newest, before)]
    learned = [name for name in states[0] if "running_" not in name and "num_batches" not in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in learned)
    lines = [json.loads(line) for line in (latest / "skipped_steps.jsonl").read_text().splitlines()]
    assert sorted((line["step"], line["rank"]) for line in lines) == [
        (s, r) for s in (2, 3, 4) for r in (0, 1)
    ]
    assert all(len(line["keys"]) == 4 for line in lines)
