"""What users give wrong: one sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interloom.train import cli
from interloom.train.cli import main


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["trainer.max_step=3"],
            "'trainer.max_step' is not a setting of train; did you mean trainer.max_steps or trainer.max_time?",
        ),
        (["experimnt=groupvit_demo"], "did you mean experiment?"),
        (["experiment=groupvit_dmo"], "experiment=groupvit_dmo is not known; did you mean groupvit_demo"),
        (["trainer=cpuu"], "did you mean cpu"),
        (["trainer.max_steps=many"], "trainer.max_steps: Value 'many'"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["model.config.vision_config.depth=[1]"], "model.config.vision_config.depths"),
        (["+optim.momentum=0.9"], "'optim.momentum' is not a setting"),
        (["optim.schedule=cosin"], "use one of cosine, linear, constant"),
        (["trainer.max_steps=[1"], "cannot be read as key=value"),
        (["task=null"], "task=none"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["callbacks.checkpoint.keep=1"], "keep=1"),
        ([], "data.train is empty"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist"),
        (["-m", "trainer.devices=2,4", "trainer=ddp"], "sweep (-m) inside one process"),
        (["trainer.devices=2"], "trainer.devices=2 needs trainer=ddp"),
        (["trainer.accelerator=gpu"], "PyTorch finds no GPU"),
        (["task._target_=os.system", "task=demo"], "task._target_=os.system is not one of"),
        (["trainer.accumulate_grad_batches=4"], "here it is trainer.micro_batch_size=SAMPLES"),
        (["trainer.gradient_clip_val=1.0"], "here it is optim.clip_norm=NORM"),
        (["+trainer.fast_dev_run=true"], "here it is debug=fdr"),
        (["trainer.profiler=fast"], "use simple, advanced, pytorch"),
        (["trainer.devices=auto"], "give the number of devices"),
        (["experiment=groupvit_demo", "data.train=data/mine"], "give data.train=[data/mine]"),
        (["experiment=groupvit_demo", "data.sources={mine: [x]}"], "pairs are given as data.train=[DIR]"),
        (["data=data/mine"], "data.train=[data/mine] for pairs, as data.sources={mine: [data/mine]}"),
        (["experiment=idefics_demo", "data.sources=[x]"], "data.sources={mine: [x]}"),
        (["experiment=idefics_demo", "data.sources={mine: x}"], "data.sources={mine: [x]}"),
        (["experiment=idefics_demo", "data.train=[x]"], "given as data.sources={mine: [DIR]}"),
        (["data.train=[été]"], "no data at été"),
        (["runs_dir=it's", "ckpt_path=no (where).ckpt"], "ckpt_path=no (where).ckpt does not exist"),
    ],
)
def test_train(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.train=[nowhere]", "nowhere"),
        ("model.tokenizer=nowhere", "model.tokenizer=nowhere does not exist"),
        ("model.init_checkpoint=nowhere", "checkpoint=nowhere does not exist"),
        ("data.batch_size=0", "global batch of 0"),
        ("model.config.vision_config.patch_size=5", "not a multiple of patch_size"),
        ("model.config.vision_config.num_group_tokens=[4]", "one entry per stage"),
    ],
)
def test_settings_that_do_not_fit(
    tiny_world: Any, change: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *tiny_world.overrides, change]) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no task is chosen"),
        (["task=segmentaton"], "task=segmentaton is not known"),
        (["checkpoin=x"], "did you mean checkpoint?"),
        (["task=demo"], "checkpoint is not set"),
        (["task=demo", "checkpoint=nowhere", "data=x"], "checkpoint=nowhere does not exist"),
    ],
)
def test_eval(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["segmnt"], "did you mean segment?"),
        (["frobnicate"], "the verbs are train, eval"),
        (["data", "demmo"], "No such command"),
        (["data", "demo", "--nope"], "No such option: --nope"),
    ],
)
def test_verbs(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert expected in one_error(capsys)


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in cli.VERBS)


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_help_of_the_hydra_verbs(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "key=value" in shown
    assert "groupvit_demo" in shown


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.style == "typer"])
def test_every_verb_loads_and_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert "Usage: interloom" in capsys.readouterr().out


OWN_EXPERIMENTS = {
    "wrong key": (
        "# @package _global_\noptim:\n  lrr: 1\n",
        "'optim.lrr' in {file} is not a setting of train; did you",
    ),
    "wrong value": ("# @package _global_\noptim:\n  lr: fast\n", "optim.lr in {file}: Value 'fast'"),
    "no package": ("optim:\n  lr: 1\n", "{file} does not begin with the line '# @package _global_'"),
    "no YAML": ("# @package _global_\noptim: [1\n", "experiment/mine.yaml, line 3 is not YAML"),
    "Lightning's": ("# @package _global_\ntrainer:\n  max_epochs: 1\n", "here it is trainer.max_steps=STEPS"),
}


@pytest.mark.parametrize("kind", OWN_EXPERIMENTS)
def test_an_own_experiment_that_is_wrong(
    kind: str, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = OWN_EXPERIMENTS[kind]
    folder = tmp_path_factory.mktemp("conf")
    file = folder / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(text)
    assert main(["train", "--config-dir", str(folder), "experiment=mine"]) == 2
    assert expected.format(file=file) in one_error(capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "demo", "--out", "{place}"],
        ["data", "pairs", "{pictures}", "{place}"],
        ["data", "tokenizer", "{pictures}", "{place}"],
        ["train", "experiment=groupvit_demo", "data.train=[{pictures}]", "runs_dir={place}"],
    ],
)
@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_a_file_where_a_folder_goes_is_said_in_words(arguments, where, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "taken").write_text("x")
    place = folder / "taken" if where == "a file" else folder / "taken" / "below"
    given = [text.format(place=place, pictures=folder) for text in arguments]
    assert main(given) == 2
    assert "Errno" not in one_error(capsys)
    assert (folder / "taken").read_text() == "x"
