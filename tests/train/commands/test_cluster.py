"""Sweeps on small clusters: what a node has is asked for, what none has is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from interloom.train.commands.cluster import fitted

SWEEP = ["-m", "hydra/launcher=submitit_slurm", "experiment=groupvit_demo"]


def cluster(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: str) -> None:
    program = folder / "sinfo"
    program.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("answer", "asked", "added"),
    [
        ("2 (null)\\n", [], ["cpus_per_task=2", "gpus_per_node=null"]),
        ("64 gpu:a100:8\\n4 (null)\\n", ["trainer.devices=8"], ["cpus_per_task=8"]),
        ("256+ gpu:8(S:0-1)\\n", ["trainer.devices=8"], ["cpus_per_task=12"]),
        ("4 (null)\\n", ["hydra.launcher.cpus_per_task=3", "hydra.launcher.gpus_per_node=1"], []),
        ("", ["trainer.devices=8"], []),
    ],
)
def test_a_sweep_fits_the_largest_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, asked: list[str], added: list[str]
) -> None:
    cluster(monkeypatch, tmp_path, answer)
    assert fitted([*SWEEP, *asked]) == [*SWEEP, *asked, *(f"hydra.launcher.{one}" for one in added)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["trainer.devices=4"], "CPUs for 4 tasks, the largest has 2"),
        (["hydra.launcher.cpus_per_task=12"], "1 tasks of 12 CPUs, the largest has 2"),
        (["trainer=gpu"], "no node of this cluster has GPUs"),
    ],
)
def test_what_no_node_has_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: list[str], said: str
) -> None:
    cluster(monkeypatch, tmp_path, "2 (null)\\n")
    with pytest.raises(ValueError, match=said):
        fitted([*SWEEP, *asked])


def test_other_runs_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cluster(monkeypatch, tmp_path, "2 (null)\\n")
    assert fitted(["experiment=groupvit_demo", "trainer.devices=64"])[1] == "trainer.devices=64"
