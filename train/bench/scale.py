"""``interloom bench scale``: what a second rank brings, and what the guards and checkpoints of a run cost.

Weak scaling is measured on whole runs of the demo model: `interloom train` with one process of one thread, and
with two ranks of one thread each on twice the batch, in turns. Two processes that do not know of one another, run
at the same time, show what the machine itself allows. The guards (agreeing on finite values and on signals, noting
progress) are timed alone between two ranks, since a hundredth of a step drowns in the noise of whole steps.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...kernels.bench.contest import environment_line, in_turn, say
from ..config import CheckpointConfig

BATCH = 128
GUARD_ROUNDS = 300


def command(folder: Path, name: str, ranks: int, steps: int, batch: int, extra: list[str]) -> list[str]:
    """`interloom train` of the demo model on drawn scenes, without evaluation."""
    data = folder / "data"
    settings = [
        "experiment=groupvit_demo",
        "task=none",
        f"data.train=[{data / 'train'}]",
        "data.val=[]",
        f"model.tokenizer={data / 'tokenizer'}",
        f"data.batch_size={batch * ranks}",
        f"trainer.max_steps={steps}",
        "callbacks.progress=false",
        "callbacks.log_every=1000",
        f"runs_dir={folder / 'runs'}",
        f"name={name}",
        *extra,
    ]
    if ranks > 1:
        settings += ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"]
    else:
        settings += ["trainer=cpu"]
    return [sys.executable, "-m", "interloom.train", *settings]


def run_all(folder: Path, commands: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Run commands at the same time, one thread a rank; each one's ``metrics.json``.

    Raises:
        ValueError: one of them failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, line in commands.items()
    }
    metrics = {}
    for name, process in started.items():
        said, _ = process.communicate()
        if process.returncode:
            raise ValueError(f"the training run of the benchmark failed:\n{said[-2000:]}")
        metrics[name] = json.loads((folder / "runs" / name / "latest" / "metrics.json").read_text())
    return metrics


def _speed(folder: Path, commands: dict[str, list[str]]) -> float:
    """Samples a second of runs that go on at the same time, added up."""
    found = run_all(folder, commands)
    return sum(metrics["train/samples_per_second"] for metrics in found.values())


def guard_seconds() -> float:
    """Seconds a step that two ranks spend agreeing on finite values and signals and noting progress."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory(prefix="interloom-bench-") as folder:
        multiprocessing.spawn(_time_guards, args=(folder,), nprocs=2)  # type: ignore[attr-defined]
        return max(float((Path(folder) / f"{rank}.txt").read_text()) for rank in range(2))


def _time_guards(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from ..parallel.ranks import agree
    from ..parallel.watchdog import BETWEEN, COMPUTING, Watchdog

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    watchdog = Watchdog(dist.distributed_c10d._get_default_store(), rank, 2, timeout=600.0)  # type: ignore[arg-type]
    loss, norm = torch.tensor(1.0), torch.tensor(2.0)
    times = []
    for step in range(GUARD_ROUNDS):
        dist.barrier()
        begun = time.perf_counter()
        watchdog.mark(step, COMPUTING)
        agree(torch.isfinite(loss) & torch.isfinite(norm), 0)
        watchdog.mark(step, BETWEEN)
        times.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    for _ in range(20):
        watchdog._send(watchdog.report())
    report = (time.perf_counter() - begun) / 20  # sent every few seconds, counted here as if by every step
    (Path(folder) / f"{rank}.txt").write_text(repr(statistics.median(times) + report))
    dist.destroy_process_group()


def scale_benchmark(rounds: int, steps: int, ranks: int, batch: int) -> dict[str, float]:
    """All figures, flat name to number."""
    from ..data.drawn.pairs import write_demo

    saves: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="interloom-bench-") as name:
        folder = Path(name)
        write_demo(folder / "data", train=1024, val=16)
        extra = [f"callbacks.checkpoint.every_steps={max(1, steps // 4)}"]
        quiet = ["callbacks.checkpoint.every_steps=0"]
        # Checkpoints are timed by the run itself and left out of the runs that speed is read from.
        contestants = {
            "one": {"one": command(folder, "one", 1, steps, batch, quiet)},
            "ranks": {"ranks": command(folder, "ranks", ranks, steps, batch, quiet)},
            "apart": {
                f"apart{n}": command(folder, f"apart{n}", 1, steps, batch, quiet) for n in range(ranks)
            },
        }
        sides = {kind: partial(_speed, folder, lines) for kind, lines in contestants.items()}
        speeds = in_turn(sides, rounds, report=lambda line: say(f"{line} samples/s"))
        for kind, count in (("one", 1), ("ranks", ranks)):
            found = run_all(folder, {kind: command(folder, kind, count, steps, batch, extra)})
            saves[kind] = found[kind]["train/checkpoint_seconds"]
    return summarise(speeds, saves, guard_seconds(), ranks, batch)


def summarise(
    speeds: dict[str, list[float]], saves: dict[str, float], guards: float, ranks: int, batch: int
) -> dict[str, float]:
    """The figures from samples/s of every round, and seconds of a checkpoint and of a step's guards."""
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    step = batch * ranks / medians["ranks"]
    interval = CheckpointConfig().every_steps
    return {
        "ranks": ranks,
        "batch_per_rank": batch,
        "one/samples_per_second": medians["one"],
        "ranks/samples_per_second": medians["ranks"],
        "apart/samples_per_second": medians["apart"],
        "weak_scaling": medians["ranks"] / medians["one"],
        "machine_limit": medians["apart"] / medians["one"],
        "step_seconds": step,
        "guard_seconds": guards,
        "guard_share": guards / step,
        "checkpoint_seconds_one": saves["one"],
        "checkpoint_seconds_ranks": saves["ranks"],
        "checkpoint_interval_steps": interval,
        "checkpoint_share_one": saves["one"] / (interval * batch / medians["one"]),
        "checkpoint_share_ranks": saves["ranks"] / (interval * step),
    }


def scale(
    rounds: Annotated[int, typer.Option(help="Runs of each kind, taken in turns.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of a run.")] = 16,
    ranks: Annotated[int, typer.Option(help="Ranks, one thread each.")] = 2,
    batch: Annotated[int, typer.Option(help="Samples a rank and step.")] = BATCH,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train the demo model on one process and on several ranks; time guards and checkpoints."""
    if min(rounds, batch) < 1 or min(steps, ranks) < 2:
        raise ValueError("rounds and batch must be at least 1, steps and ranks at least 2.")
    say(environment_line())
    figures = scale_benchmark(rounds, steps, ranks, batch)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    one, several, apart = (figures[f"{kind}/samples_per_second"] for kind in ("one", "ranks", "apart"))
    print(f"one process:           {one:8.1f} samples/s")
    print(
        f"{ranks} ranks:               {several:8.1f} samples/s   {figures['weak_scaling']:.2f} times the work"
    )
    print(
        f"{ranks} processes apart:     {apart:8.1f} samples/s   {figures['machine_limit']:.2f}: the machine's limit"
    )
    guard = figures["guard_seconds"] * 1e3
    print(f"guards:     {guard:7.2f} ms of a step of {figures['step_seconds'] * 1e3:.0f} ms: "
          f"{figures['guard_share']:.2%}")  # fmt: skip
    interval = figures["checkpoint_interval_steps"]
    for kind in ("one", "ranks"):
        seconds, share = figures[f"checkpoint_seconds_{kind}"], figures[f"checkpoint_share_{kind}"]
        print(f"checkpoint: {seconds * 1e3:7.1f} ms every {interval} steps ({kind}): {share:.2%}")
