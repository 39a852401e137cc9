"""What a run leaves behind, and the options that change how it goes."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from interloom.train.checkpointing.load import load_pretrained
from interloom.train.cli import main
from interloom.train.objectives.groupvit.objective import GroupViTModule
from interloom.train.runs import read_metrics


def settings_of(world: Any, root: Path, *extra: str) -> list[str]:
    return [*world.overrides, f"runs_dir={root}", "name=tiny", "trainer.max_steps=2", *extra]


def train(world: Any, root: Path, *extra: str) -> Path:
    """Two steps of the tiny model, or what ``extra`` says; the run directory."""
    settings = settings_of(world, root, *extra)
    assert main(["train", *settings]) == 0
    name = next((s.removeprefix("name=") for s in reversed(settings) if s.startswith("name=")), "tiny")
    return root / name / "latest"


@pytest.fixture(scope="module")
def finished(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_world, tmp_path_factory.mktemp("finished"), "callbacks.checkpoint.every_steps=1")


def test_a_run_directory_holds_what_the_design_says(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "metrics.json",
        "model",
    ]
    metrics = read_metrics(finished)
    assert metrics["train/steps"] == 2
    assert all(isinstance(value, int | float) for value in metrics.values())
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 8
    assert config["trainer"]["max_steps"] == 2
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    with open(finished / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_every_form_of_checkpoint_gives_the_same_model(finished: Path) -> None:
    ckpt = finished / "checkpoints" / "step-00000002.ckpt"
    ids = torch.tensor([[2, 4, 5, 1], [2, 6, 1, 0]])
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in (finished, finished / "model", ckpt, finished / "checkpoints"):
        model, processor = load_pretrained(path)
        assert not model.training
        assert processor(text="a red square")["input_ids"][-1] == 1
        with torch.no_grad():
            outputs.append(model(input_ids=ids, pixel_values=pixels).logits_per_image)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_finished_run_can_be_asked_for_again(tiny_world: Any, tmp_path: Path) -> None:
    before = os.path.realpath(train(tiny_world, tmp_path))
    weights = (Path(before) / "model" / "model.safetensors").read_bytes()
    assert os.path.realpath(train(tiny_world, tmp_path, "ckpt_path=last")) == before
    assert (Path(before) / "model" / "model.safetensors").read_bytes() == weights
    longer = train(tiny_world, tmp_path, "ckpt_path=last", "trainer.max_steps=3")
    assert read_metrics(longer)["train/steps"] == 3


def test_a_new_run_may_start_from_the_weights_of_another(
    tiny_world: Any, tmp_path: Path, finished: Path
) -> None:
    start = f"model.init_checkpoint={finished}"
    run = train(tiny_world, tmp_path, start, "optim.lr=1e-12", "optim.weight_decay=0", "trainer.max_steps=1")
    before, after = (load_pretrained(path)[0].state_dict() for path in (finished, run))
    name = "visual_projection.0.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)


def test_a_sweep_runs_in_process(tiny_world: Any, tmp_path: Path) -> None:
    settings = [*tiny_world.overrides, f"runs_dir={tmp_path}", "name=sweep", "trainer.max_steps=1"]
    assert main(["train", "-m", *settings, "model.config.vision_config.assign_hard=true,false"]) == 0
    runs = [path for path in (tmp_path / "sweep").iterdir() if not path.is_symlink()]
    chosen = {
        yaml.safe_load((run / "config.yaml").read_text())["model"]["config"]["vision_config"]["assign_hard"]
        for run in runs
    }
    assert chosen == {True, False}
    assert all((run / "metrics.json").exists() for run in runs)


def test_overfitting_repeats_one_batch(tiny_world: Any, tmp_path: Path) -> None:
    extra = ["debug=overfit", "trainer.max_steps=40", "callbacks.log_every=1", "optim.lr=3e-3", "name=tiny"]
    run = train(tiny_world, tmp_path, *extra, "model.multi_label=0", "model.share_identical=true")
    with open(run / "metrics.csv") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_low_precision_trains(tiny_world: Any, tmp_path: Path, precision: str, finished: Path) -> None:
    run = train(tiny_world, tmp_path, f"trainer.precision={precision}", "trainer.micro_batch_size=4")
    low, full = read_metrics(run)["train/loss"], read_metrics(finished)["train/loss"]
    assert low != full
    assert low == pytest.approx(full, rel=0.05)


def test_wandb_writes_beside_the_table_and_stays_offline(tiny_world: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = train(tiny_world, tmp_path, "logger=wandb")
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert (run / "metrics.csv").exists()


def test_steps_that_changed_nothing_are_counted_across_a_resume(
    tiny_world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward_step = GroupViTModule.backward_step

    def second_is_not_finite(self: Any, batch: Any, step: int) -> Any:
        metrics = backward_step(self, batch, step)
        if step == 1:
            metrics["loss"] = torch.tensor(float("nan"))
        return metrics

    monkeypatch.setattr(GroupViTModule, "backward_step", second_is_not_finite)
    assert read_metrics(train(tiny_world, tmp_path))["train/nonfinite_steps"] == 1
    run = train(tiny_world, tmp_path, "ckpt_path=last", "trainer.max_steps=4")
    assert read_metrics(run)["train/steps"] == 4
    assert read_metrics(run)["train/nonfinite_steps"] == 1


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None])
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(
    tiny_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    if content is None:  # half of a whole one
        whole = train(tiny_world, tmp_path) / "checkpoints" / "step-00000002.ckpt"
        content = whole.read_bytes()[: whole.stat().st_size // 2]
    path = tmp_path / "step-00000002.ckpt"
    path.write_bytes(content)
    capsys.readouterr()
    assert main(["train", *settings_of(tiny_world, tmp_path / "other", f"ckpt_path={path}")]) == 2
    error = capsys.readouterr().err
    assert f"ckpt_path={path} is damaged, or no checkpoint" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()
