"""Run directories, metrics.json and metrics.csv."""

import json
import os
from pathlib import Path

import pytest
from interloom.train.files import write_atomically
from interloom.train.runs import (
    MetricsTable,
    create_run,
    new_run_id,
    point_latest,
    read_metrics,
    runs_newest_first,
    write_metrics,
)


def test_latest_points_to_the_newest_run(tmp_path: Path) -> None:
    create_run(tmp_path / "a", "one")
    create_run(tmp_path / "a", "two")
    assert os.readlink(tmp_path / "a" / "latest") == "two"
    assert (tmp_path / "a" / "latest" / "checkpoints").is_dir()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["latest", "one", "two"]


def test_a_real_folder_named_latest_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    point_latest(tmp_path, "one")
    assert not (tmp_path / "latest").is_symlink()


def test_runs_come_newest_first_by_their_start(tmp_path: Path) -> None:
    for age, name in ((30, "b"), (10, "c"), (20, "a")):
        write_atomically(create_run(tmp_path, name) / "config.yaml", "")
        os.utime(tmp_path / name / "config.yaml", ns=(0, 10**18 - age))
    write_metrics(tmp_path / "b", {"later": 1})  # evaluating an old run does not make it the newest
    assert [run.name for run in runs_newest_first(tmp_path)] == ["c", "a", "b"]
    assert runs_newest_first(tmp_path / "nowhere") == []


def test_metrics_are_flat_merged_and_valid_json(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"train/loss": 2.5, "segmentation/miou": float("nan")})
    write_metrics(tmp_path, {"train/loss": 1.5, "steps": 3})
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"train/loss": 1.5, "segmentation/miou": None, "steps": 3}
    assert read_metrics(tmp_path)["steps"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_run_ids_differ_and_a_launcher_may_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERLOOM_RUN_ID", raising=False)
    assert new_run_id() != new_run_id()
    monkeypatch.setenv("INTERLOOM_RUN_ID", "job-7")
    assert new_run_id() == "job-7"
    monkeypatch.setenv("INTERLOOM_RUN_ID", "../x")
    with pytest.raises(ValueError, match="INTERLOOM_RUN_ID"):
        new_run_id()


def test_a_table_goes_on_where_the_run_was_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.open(0)
    for step in (1, 2, 3, 4):
        table.append(step, {"loss": 1 / step})
    with open(path, "a") as file:
        file.write("5,0.")  # killed in the middle of a line
    again = MetricsTable(path)
    again.open(2)
    again.append(3, {"loss": 0.125, "extra": 7.0})
    assert path.read_text().splitlines() == ["step,loss,extra", "1,1.0,", "2,0.5,", "3,0.125,7.0"]


def test_rows_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import builtins

    table = MetricsTable(tmp_path / "metrics.csv")
    table.open(0)
    table.append(1, {"loss": 1.0})
    whole = builtins.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return self.file.write(data[:3])  # as much as there is room for

    monkeypatch.setattr(
        builtins, "open", lambda *a, **k: Full(whole(*a, **k)) if "ab" in a else whole(*a, **k)
    )
    table.append(2, {"loss": 0.5})
    table.append(3, {"loss": 0.25})
    assert table.path.read_text().splitlines() == ["step,loss", "1,1.0"]
    assert capsys.readouterr().err.count("No space left") == 1
    monkeypatch.setattr(builtins, "open", whole)
    table.append(4, {"loss": 0.125})
    assert table.path.read_text().splitlines() == ["step,loss", "1,1.0", "2,0.5", "3,0.25", "4,0.125"]
