"""The way in from Python gives what the command line gives, quietly, and the notebook's cells run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from interloom.train import build_loader, compose_config, evaluate, fit, load, segment
from interloom.train.cli import main
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parents[3] / "examples" / "first_steps.ipynb"


def settings(world, root, *extra):
    return [*world.overrides, "name=run", f"runs_dir={root}", "trainer.max_steps=2", *extra]


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    return fit(compose_config(settings(tiny_world, tmp_path_factory.mktemp("python"))))


def test_fit_is_the_run_of_the_command_line(tiny_world, tmp_path, run):
    assert main(["train", *settings(tiny_world, tmp_path)]) == 0
    (other,) = (path for path in (tmp_path / "run").iterdir() if not path.is_symlink())
    left, right = load(run)[0].state_dict(), load(other / "last")[0].state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    texts = [(path / "config.yaml").read_text().replace(str(path.parents[1]), "") for path in (run, other)]
    assert texts[0] == texts[1]


def test_it_is_quiet_and_leaves_the_callers_hydra_alone(tiny_world, tmp_path, capfd):
    from hydra import compose, initialize_config_module

    with initialize_config_module("interloom.conf", version_base="1.3"):
        config = compose_config(settings(tiny_world, tmp_path))
        config.trainer.max_steps = 1
        found = fit(config)
        assert compose("train").trainer.max_steps == 1000
    assert capfd.readouterr() == ("", "")
    with open(found / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 1


@pytest.mark.parametrize(
    "how",
    ["from interloom.train import fit", "import interloom.train.fitting; fit = interloom.train.fit",
     "import interloom.train as t; from interloom.train.commands import train; fit = t.fit"],
)  # fmt: skip
def test_fit_can_be_called_however_it_is_imported(how):
    code = f"{how}; assert callable(fit), fit; import interloom.train; assert 'fit' in dir(interloom.train)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_imported_without_torch():
    code = "import sys, interloom.train; assert not {'torch', 'hydra', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_setting_is_one_sentence(tiny_world, tmp_path):
    with pytest.raises(ValueError, match=r"did you mean trainer\.max_steps"):
        compose_config(["trainer.max_step=3"])
    with pytest.raises(ValueError, match="one string"):
        compose_config("trainer.max_steps=3")
    with pytest.raises(ValueError, match=r"experiment=nothing is not known"):
        fit(["experiment=nothing"])
    with pytest.raises(FileNotFoundError, match="config_dir=nowhere"):
        compose_config(config_dir="nowhere")
    with pytest.raises(ValueError, match="no option 'limt'"):
        evaluate(tmp_path, "retrieval", limt=3)


def test_own_experiments_are_found(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n")
    config = compose_config(["experiment=mine"], config_dir=tmp_path)
    assert (config.trainer.max_steps, config.name) == (7, "mine")


def test_the_loader_gives_the_runs_batches(tiny_world, tmp_path):
    config = compose_config(
        settings(tiny_world, tmp_path, f"data.val=[{tiny_world.shards}]", "data.eval_batch_size=16")
    )
    whole = [batch["keys"] for batch in build_loader(config)]
    halves = [[batch["keys"] for batch in build_loader(config, rank=rank, world_size=2)] for rank in (0, 1)]
    assert len(whole) == 2
    assert whole == [first + second for first, second in zip(*halves, strict=True)]
    held_out = [
        key
        for batch in build_loader(config, split="val")
        for key, valid in zip(batch["keys"], batch["valid"], strict=True)
        if valid
    ]
    assert len(set(held_out)) == len(held_out) == 40


def test_scores_and_segments(tiny_world, run, tmp_path):
    scores = evaluate(run, "retrieval", data=tiny_world.shards, limit=10)
    assert scores["retrieval/images"] == 10
    assert not list(run.glob("eval*"))
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = load(run)
    pictures = (tmp_path / "a.png", Image.fromarray(pixels), pixels)
    ways = [
        segment(picture, ["red", "green"], checkpoint=source, threshold=None)
        for picture in pictures
        for source in (run, model)
    ]
    assert all(np.array_equal(way.mask, ways[0].mask) and way.scores == ways[0].scores for way in ways)
    assert ways[0].mask.shape == (20, 30)
    assert sum(ways[0].shares().values()) == pytest.approx(1)
    assert ways[0].save(tmp_path / "overlay.png").is_file()
    assert segment(pixels, "red,green", checkpoint=model, background=["blue"]).labels == ["red", "green"]
    for wrong in (pixels[..., 0], pixels.astype(np.float32)):
        with pytest.raises(ValueError, match="RGB uint8"):
            segment(wrong, ["red"], checkpoint=model)
    with pytest.raises(ValueError, match="labels is empty"):
        segment(pixels, [], checkpoint=model)


def test_the_notebooks_cells_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCENES", "64")
    monkeypatch.setenv("STEPS", "4")
    names: dict = {}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for number, cell in enumerate(cells):
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert "mIoU" in capsys.readouterr().out
    assert (tmp_path / "segments.png").is_file()
