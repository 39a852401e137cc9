"""A job on a real SLURM: it loses a rank, is stopped, requeued twice, and ends in the bits of an undisturbed run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import World, assert_same_run, several
from .slurm import Cluster, missing

# docs/scale.md has these lines.
SCRIPT = """#!/bin/bash
#SBATCH --job-name=faults --nodes=1 --ntasks-per-node=2 --requeue --open-mode=append --output={log}
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
echo "begins: $SLURM_RESTART_COUNT"
srun --kill-on-bad-exit=1 {command}
code=$?
echo "srun ended with $code"
case $code in
  0|2) exit $code ;;
  143) scontrol requeue "$SLURM_JOB_ID" ;;
  *) [ "${{SLURM_RESTART_COUNT:-0}}" -lt 10 ] && scontrol requeue "$SLURM_JOB_ID" || exit $code ;;
esac
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


class SlurmJob:
    def __init__(self, cluster: Cluster, world: World, root: Path) -> None:
        self.cluster, self.root, self.log = cluster, root, root / "log"
        arguments = [a for a in world.arguments(root, *several(2)) if a != "train"]
        quoted = " ".join(f"'{a}'" for a in [sys.executable, "-m", "interloom.train", *arguments])
        script = root / "job.sh"
        script.write_text(SCRIPT.format(log=self.log, command=quoted))
        self.number = cluster.call("sbatch", "--parsable", str(script)).strip()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, until: Callable[[], bool], limit: float = 900) -> None:
        end = time.monotonic() + limit
        while not until():
            assert time.monotonic() < end, f"{self.said()}\n{self.cluster.said()}"
            time.sleep(0.05)

    def steps(self) -> int:
        table = self.root / "run" / f"slurm-{self.number}" / "metrics.csv"
        return table.read_text().count("\n") - 1 if table.exists() else 0

    def ranks(self) -> list[int]:
        """The processes that train, by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                values = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"SLURM_JOB_ID={self.number}".encode() in values and b"interloom.train" in command:
                rank = [value for value in values if value.startswith(b"SLURM_PROCID=")]
                if rank and b"bin/srun" not in command and not command.startswith(b"srun"):
                    found.setdefault(int(rank[0].split(b"=")[1]), int(entry.name))
        return [found[rank] for rank in sorted(found)]


@pytest.mark.timeout(3600)  # three starts of Python on a busy machine
def test_a_lost_rank_and_a_stop_are_requeued_and_change_no_bit(
    cluster: Cluster, groupvit: World, tmp_path: Path, uninterrupted: Callable[..., Path]
) -> None:
    wanted = uninterrupted(groupvit)
    job = SlurmJob(cluster, groupvit, tmp_path)
    job.wait(lambda: job.steps() >= 4)
    os.kill(job.ranks()[1], signal.SIGKILL)
    job.wait(lambda: "srun ended with" in job.said(), limit=120)
    assert "srun ended with 137" in job.said() or "srun ended with 1\n" in job.said()
    assert "gloo" not in job.said().lower(), job.said()
    job.wait(lambda: "begins: 1" in job.said() and len(job.ranks()) == 2)
    time.sleep(1.0)  # while modules are still imported
    cluster.call("scancel", "--signal=USR1", job.number)
    job.wait(lambda: job.said().count("srun ended with") == 2)
    assert "srun ended with 143" in job.said()
    job.wait(lambda: job.said().count("srun ended with") == 3)
    assert job.said().endswith("srun ended with 0\n"), job.said()
    assert_same_run(tmp_path, wanted)
