"""What a run is scored on at its end is looked for before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interloom.train.cli import main


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (
            ["task=retrieval"],
            "task=retrieval has no data to score the run on at its end; give +task.data=DIR",
        ),
        (["task=retrieval", "+task.data=nowhere"], "task.data=nowhere, on which the run is scored"),
        (["task=demo"], "make it with `interloom data demo --out data/demo`"),
        (["task=demo", "task.data={there}"], "task=demo scores the drawn scenes of"),
    ],
)
def test_before_the_run(
    task: list[str], expected: str, tiny_world: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "scenes"
    there.mkdir()
    arguments = [*tiny_world.overrides, *(part.format(there=there) for part in task), "trainer.max_steps=1"]
    assert main(["train", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_place_that_is_a_file_is_found_before_the_work(
    tiny_world: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from interloom.train.evaluation.groupvit import retrieval

    monkeypatch.setattr(retrieval, "run", lambda **_: pytest.fail("it began to work"))
    (tmp_path / "runs").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "groupvit"}')
    arguments = [
        f"checkpoint={tmp_path / 'model'}",
        f"data={tiny_world.shards}",
        f"runs_dir={tmp_path / 'runs'}",
    ]
    assert main(["eval", "task=retrieval", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "runs") in line


def test_segment_says_the_best_score_and_the_option() -> None:
    from interloom.train.commands.segment import nothing_found

    said = nothing_found(["cat", "dog"], [0.2, 0.41], 0.95)
    assert said == (
        "nothing above the threshold of 0.95; the best score is 0.41 (dog), --threshold 0.40 shows it, --threshold 0 "
        "names every pixel"
    )
