"""Every part of docs/extending.md, taken from the text, runs from a folder outside the package."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.train import compose_config, evaluate, fit
from interloom.train.cli import main
from interloom.train.data.augment import uniforms
from interloom.train.data.shards.reader import ShardReader, ShardSet
from interloom.train.evaluation.tasks import check_task

DOCS = Path(__file__).resolve().parents[3] / "docs" / "extending.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The folder of the document, and a distribution with its entry points beside it."""
    text = DOCS.read_text()
    folder = tmp_path / "mine"
    for group in ("experiment", "task"):
        (folder / "conf" / group).mkdir(parents=True)
    yaml, toml = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("yaml", "toml"))
    parts = re.findall(r"```python\n(.*?)```", text, re.S)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(yaml)
    (folder / "conf" / "task" / "brightness.yaml").write_text(
        "{_target_: more.brightness, _partial_: true, limit: 5}\n"
    )
    for name, content in zip(("parts", "more", "kernel"), parts, strict=True):
        (folder / f"{name}.py").write_text(content)
    points = toml.replace("project.entry-points.", "").replace('"', "")
    information = folder / "more-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(points)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    yield folder
    for name in ("parts", "more", "kernel"):
        sys.modules.pop(name, None)


def test_an_experiment_with_a_callback_a_logger_an_augmentation_and_a_loss_term(
    mine, tiny_world, tmp_path, monkeypatch
):
    world = [item for item in tiny_world.overrides if not item.startswith("trainer.max_steps")]
    command = [
        "train",
        "--config-dir",
        "mine/conf",
        "experiment=mine",
        *world,
        f"runs_dir={tmp_path / 'runs'}",
    ]
    assert main(command) == 0
    latest = tmp_path / "runs" / "mine" / "latest"
    with open(latest / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["own/weight_norm"]) > 0 for row in rows)
    for row in rows:
        whole = float(row["train/contrastive_loss"]) + float(row["train/multi_label_loss"])
        assert float(row["train/loss"]) == pytest.approx(whole - 0.1 * float(row["train/entropy"]), rel=1e-5)
    lines = [json.loads(line) for line in Path("lines.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[:3]] == [float(row["train/loss"]) for row in rows]
    # The same from Python, and what the augmentation did.
    run = fit(
        compose_config(["experiment=mine", *world, f"runs_dir={tmp_path / 'python'}"], config_dir="mine/conf")
    )
    with open(run / "metrics.csv", newline="") as file:
        assert [row["train/loss"] for row in csv.DictReader(file)] == [row["train/loss"] for row in rows]
    import parts

    pixels, positions = torch.rand(40, 3, 2, 2), np.arange(40)
    grey = parts.SometimesGrey(0.5)(pixels, positions, 3)
    chosen = torch.from_numpy(uniforms(3, positions, "grey") < 0.5)
    assert torch.equal(grey[~chosen], pixels[~chosen])
    assert 0 < int(chosen.sum()) < 40
    assert torch.allclose(grey[chosen], pixels[chosen].mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_a_source_and_a_task_of_an_installed_package(mine, tiny_world, tmp_path):
    (tmp_path / "captions.txt").write_text("red thing\nblue thing\ngreen thing\n")
    assert main(["data", "pairs", "lines:captions.txt", "out"]) == 0
    shards = ShardSet.open(["out/train" if Path("out/train").is_dir() else "out"], kind="pairs")
    assert len(shards) == 3
    assert bytes(ShardReader(shards).read(1).members["txt"]) == b"blue thing"
    run = fit([*tiny_world.overrides, "trainer.max_steps=1", f"runs_dir={tmp_path / 'runs'}"])
    given = [
        "--config-dir",
        "mine/conf",
        "task=brightness",
        f"checkpoint={run}",
        f"runs_dir={tmp_path / 'eval'}",
    ]
    assert main(["eval", *given]) == 0
    scores = json.loads((tmp_path / "eval" / "eval_brightness" / "latest" / "metrics.json").read_text())
    assert scores["brightness/limit"] == 5
    assert scores["brightness/mean"] > 0
    assert evaluate(run, "retrieval", data=tiny_world.shards, limit=4)["retrieval/images"] == 4


def test_a_kernel_against_its_reference(mine):
    code = (
        "import sys; sys.path.insert(0, 'mine'); import kernel, torch; x = torch.randn(1000); "
        "assert torch.equal(kernel.relu_squared(x), kernel.relu_squared_reference(x)); "
        "assert len(kernel.times(64)) == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("callbacks.extra.mine=3", "has no _target_"),
        ("callbacks.extra.mine._target_=no_such.Thing", "cannot be made"),
        ("callbacks.extra.mine._target_=builtins.dict", "expected a lightning Callback"),
        ("data.augment.extra.mine._target_=builtins.dict", "expected something to call"),
        ("objective={weight: 3}", "objective._target_"),
    ],
)
def test_a_part_that_cannot_be_made_is_one_sentence(tiny_world, tmp_path, capsys, override, words):
    assert main(["train", *tiny_world.overrides, f"runs_dir={tmp_path}", "name=x", override]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "x").exists()


def test_a_task_that_nobody_installed_is_never_called():
    with pytest.raises(ValueError, match="is not one of"):
        check_task({"_target_": "os.system", "_partial_": True, "command": "true"})
