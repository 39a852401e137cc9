"""Who starts the ranks: torchrun, srun, submitit, or the command itself."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from interloom.train.checkpointing.folder import checkpoint_name
from interloom.train.checkpointing.resume import find_place
from interloom.train.cli import main
from interloom.train.commands.schemas import register_schemas
from interloom.train.parallel import launch
from interloom.train.parallel.launch import adopt_launcher, check_launcher, exit_code, scheduled_run_id
from interloom.train.runs import new_run_id

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[07-08,11]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables, and none left behind."""
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(("SLURM_", "SUBMITIT_", "INTERLOOM_RUN_ID")):
            monkeypatch.delenv(name)
    for name in LAUNCHER_VARIABLES:  # so that what adopt_launcher sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "import sys; from interloom.train.cli import main; sys.exit(main())",
        *arguments,
    ]


def test_the_plain_command_starts_its_ranks_with_one_run_directory(
    tiny_world: Any, tmp_path: Path, clean: Any
) -> None:
    arguments = ["train", *tiny_world.overrides, *TWO, "name=plain", "trainer.max_steps=3"]
    done = subprocess.run(
        command(*arguments), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (run,) = [path for path in (tmp_path / "runs" / "plain").iterdir() if not path.is_symlink()]
    assert (run / "model" / "model.safetensors").exists()
    with open(run / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert '"world_size": 2' in (run / "environment.json").read_text()
    assert done.stdout.count("run directory:") == 1
    assert "error" not in done.stderr.lower()


def test_srun_variables_become_those_of_torchrun(clean: pytest.MonkeyPatch) -> None:
    set_all(clean, SRUN)
    assert adopt_launcher() == 16
    assert [os.environ[name] for name in LAUNCHER_VARIABLES[:5]] == ["9", "1", "1", "16", "node07"]
    first = int(os.environ["MASTER_PORT"])
    assert 15000 <= first < 35000
    clean.delenv("WORLD_SIZE")
    clean.delenv("MASTER_PORT")
    clean.setenv("SLURM_STEP_ID", "1")
    adopt_launcher()
    assert int(os.environ["MASTER_PORT"]) != first


def test_the_shell_of_a_batch_script_is_no_launcher(clean: pytest.MonkeyPatch) -> None:
    batch = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    set_all(clean, batch)
    assert adopt_launcher() == 1
    assert "RANK" not in os.environ
    assert scheduled_run_id() is None


def test_submitit_variables_become_those_of_torchrun(clean: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    local = {
        "JOB_ID": "12",
        "NTASKS": "2",
        "JOB_NUM_NODES": "1",
        "NODEID": "0",
        "GLOBALID": "1",
        "LOCALID": "1",
    }
    set_all(clean, {"SUBMITIT_EXECUTOR": "local"})
    set_all(clean, {f"SUBMITIT_LOCAL_{name}": value for name, value in local.items()})
    assert adopt_launcher() == 2
    assert [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "1", "2"]


def test_half_a_launcher_is_refused(clean: pytest.MonkeyPatch) -> None:
    clean.setenv("WORLD_SIZE", "2")
    clean.setenv("RANK", "0")
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        adopt_launcher()


def test_a_requeued_job_goes_on_in_its_own_run(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch
    from interloom.train.config import TrainConfig

    config = TrainConfig(name="x", runs_dir=str(tmp_path))
    set_all(clean, SRUN)
    assert new_run_id() == "slurm-4711"
    clean.setenv("SLURM_STEP_ID", "2")
    assert new_run_id() == "slurm-4711-2"
    set_all(clean, {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3", "SLURM_STEP_ID": "0"})
    assert new_run_id() == "slurm-4700_3"
    assert find_place(config).checkpoint is None
    folder = tmp_path / "x" / "slurm-4700_3" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({}, folder / checkpoint_name(7))
    assert find_place(config).checkpoint == folder / checkpoint_name(7)


@pytest.mark.parametrize(
    ("codes", "whole"),
    [({0: 2, 1: 2}, 2), ({1: 143}, 143), ({0: 143, 1: -15}, 143), ({1: -9}, 1), ({0: 1, 1: 2}, 2)],
)
def test_the_launchers_exit_code_is_that_of_its_ranks(codes: dict[int, int], whole: int) -> None:
    assert exit_code(codes) == whole


def test_a_sweep_in_one_process_over_several_devices_is_refused_with_the_command(
    tmp_path: Path, clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean.chdir(tmp_path)
    assert main(["train", "-m", "experiment=groupvit_demo", *TWO, "seed=1,2"]) == 2
    error = capsys.readouterr().err
    again = " ".join(["experiment=groupvit_demo", *TWO, "seed=1,2"])
    assert f"interloom train -m hydra/launcher=submitit_slurm {again}" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:(?s).*validated against ConfigStore schema")
def test_the_slurm_launcher_composes() -> None:
    pytest.importorskip("submitit")
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    register_schemas()
    overrides = ["hydra/launcher=submitit_slurm", "trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2"]
    with initialize_config_module("interloom.conf", version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    launcher = instantiate(config.hydra.launcher)
    wanted = {"tasks_per_node": 8, "nodes": 2, "gpus_per_node": 8, "max_num_timeout": 1000}
    assert {name: launcher.params[name] for name in wanted} == wanted


def test_what_a_launcher_lacks_is_said_before_anything_runs(clean: pytest.MonkeyPatch) -> None:
    clean.setattr(launch, "which", lambda name: None)
    clean.setattr(launch, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="finds no srun here"):
        check_launcher(["-m", "hydra/launcher=submitit_slurm"])
    check_launcher(["hydra/launcher=submitit_slurm", "--cfg", "hydra"])
    clean.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"install interloom\[slurm\]"):
        check_launcher(["-m", "hydra/launcher=submitit_local"])
