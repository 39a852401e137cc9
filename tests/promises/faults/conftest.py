"""Runs of several ranks that are hurt on purpose: two tiny objectives and a launcher to kill them under.

The ranks are forked from the test process, which has loaded everything already, and looked after as torchrun's
agent does: the store through which they meet lives outside of them, and when one fails the others get SIGTERM
and, after a while, SIGKILL.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interloom.train.checkpointing.folder import AtomicCheckpointIO, checkpoints_newest_first
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from safetensors.torch import load_file

STEPS = 12
EVERY = 3
GRACE = 8.0
STRATEGIES = ("ddp", "fsdp2")
OBJECTIVES = ("groupvit", "idefics")
Fault = Callable[[int], Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is slow and kills processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.faults)


@dataclass(frozen=True)
class World:
    """Data and settings of one objective; ``overrides`` are those of a small model on a batch of 8."""

    objective: str
    data: Path
    overrides: list[str]

    def arguments(self, root: Path, *extra: str) -> list[str]:
        """`interloom train` of :data:`STEPS` steps below ``root``, a checkpoint every :data:`EVERY`."""
        return [
            "train",
            *self.overrides,
            "name=run",
            f"runs_dir={root}",
            f"trainer.max_steps={STEPS}",
            f"callbacks.checkpoint.every_steps={EVERY}",
            "callbacks.progress=false",
            "callbacks.log_every=1",
            "optim.clip_norm=1.0",
            "optim.ema_decay=0.8",
            # Where a gradient is rounding alone, Adam would blow it up to the full rate: ranks would differ there.
            "optim.eps=1e-4",
            *extra,
        ]


def several(count: int, strategy: str = "ddp") -> list[str]:
    """Settings for that many ranks on this machine's CPU."""
    return [f"trainer={strategy}", "trainer.accelerator=cpu", f"trainer.devices={count}"]


@pytest.fixture(scope="session")
def groupvit(tiny_world: Any) -> World:
    settings = ["model.config.vision_config.drop_path_rate=0.2", "data.max_skip_rate=0.5"]
    return World("groupvit", tiny_world.shards, [*tiny_world.overrides, *settings])


@pytest.fixture(scope="session")
def idefics(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("documents") / "demo"
    write_demo(folder, train=60, val=8, seed=1)
    return World("idefics", folder / "train", idefics_overrides(folder / "train", folder / "tokenizer"))


def idefics_overrides(shards: Path, tokenizer: Path) -> list[str]:
    """The smallest IDEFICS on documents of 96 tokens."""
    model = {
        "vocab_size": 128, "additional_vocab_size": 2, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "cross_layer_interval": 1, "pad_token_id": 3,
        "alpha_initializer": "ones", "use_resampler": "false", "freeze_text_layers": "false",
        "freeze_vision_layers": "false", "freeze_lm_head": "false",
        "vision_config.embed_dim": 16, "vision_config.image_size": 32, "vision_config.patch_size": 16,
        "vision_config.intermediate_size": 32, "vision_config.num_hidden_layers": 1,
        "vision_config.num_attention_heads": 2,
    }  # fmt: skip
    data = {
        "sources": f"{{demo: [{shards}]}}", "tokenizer": tokenizer, "max_tokens": 96, "image_size": 32,
        "crop_scale": "null", "batch_size": 8, "workers": 0, "max_skip_rate": 0.5,
    }  # fmt: skip
    settings = ["model=idefics", "data=documents", "trainer=cpu"]
    settings += [f"model.config.{name}={value}" for name, value in model.items()]
    return settings + [f"data.{name}={value}" for name, value in data.items()]


@pytest.fixture(scope="session", autouse=True)
def warm(groupvit: World, idefics: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import everything once, before ranks are forked."""
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401

    for world in (groupvit, idefics):
        root = tmp_path_factory.mktemp("warm")
        assert main(world.arguments(root, "trainer.max_steps=1")) == 0


@pytest.fixture(params=OBJECTIVES)
def world(request: pytest.FixtureRequest) -> World:
    """Each objective in turn."""
    return request.getfixturevalue(request.param)


@dataclass
class Job:
    """The ranks of one `interloom train` command."""

    arguments: list[str]
    root: Path
    count: int = 2
    fault: Fault | None = None
    processes: list[Any] = field(default_factory=list)

    def start(self) -> Job:
        """Fork the ranks."""
        # As the agent's: a rank that dies does not take the store along.
        self.store = dist.TCPStore(
            "127.0.0.1", free_port(), is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self.root.mkdir(parents=True, exist_ok=True)
        for rank in range(self.count):
            process = multiprocessing.get_context("fork").Process(target=self._child, args=(rank,))
            process.start()
            self.processes.append(process)
        return self

    def _child(self, rank: int) -> None:
        os.setsid()  # data workers get what their rank's group gets
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.count),
            "LOCAL_WORLD_SIZE": str(self.count),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "faults",
        }
        log = os.open(self.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
        code = 1
        try:
            if self.fault is not None:
                self.fault(rank)
            code = main(self.arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def log(self, rank: int) -> Path:
        """Where a rank's stdout and stderr go: beside the root, which may be a full disk."""
        return self.root.with_name(f"{self.root.name}.rank{rank}.log")

    def said(self) -> str:
        """What all ranks printed."""
        return "\n".join(self.log(rank).read_text() for rank in range(self.count) if self.log(rank).exists())

    @property
    def latest(self) -> Path:
        return self.root / "run" / "latest"

    def steps(self) -> int:
        """The last step of ``metrics.csv``."""
        table = self.latest / "metrics.csv"
        rows = table.read_text().splitlines()[1:] if table.exists() else []
        return int(rows[-1].split(",")[0]) if rows and rows[-1].split(",")[0] else 0

    def wait_for_step(self, step: int, limit: float = 120.0) -> None:
        """Until that step is in ``metrics.csv``; also returns when a rank has ended."""
        end = time.monotonic() + limit
        while self.steps() < step and all(p.is_alive() for p in self.processes):
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks; to all where none is named."""
        for rank in ranks or range(self.count):
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def finish(self, limit: float = 150.0) -> list[int]:
        """Wait for all, ending the others when one fails; their exit codes."""
        end = time.monotonic() + limit
        told: float | None = None
        try:
            while any(p.is_alive() for p in self.processes):
                assert time.monotonic() < end, f"no end:\n{self.said()}"
                if told is None and any(p.exitcode not in (None, 0) for p in self.processes):
                    told = time.monotonic()
                    self.send(signal.SIGTERM)
                if told is not None and time.monotonic() > told + GRACE:
                    self.send(signal.SIGCONT)
                    self.send(signal.SIGKILL)
                time.sleep(0.01)
        finally:
            for process in self.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        return [process.exitcode for process in self.processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(
    world: World, root: Path, *extra: str, count: int = 2, strategy: str = "ddp", **options: Any
) -> Job:
    """Start a run on ``count`` ranks."""
    settings = several(count, strategy) if count > 1 else []
    return Job(world.arguments(root, *settings, *extra), root, count, **options).start()


def resume(
    world: World, root: Path, *extra: str, count: int = 2, strategy: str = "ddp", **options: Any
) -> Job:
    """Go on with ``ckpt_path=last`` to the end; every rank must end well."""
    job = train(world, root, "ckpt_path=last", *extra, count=count, strategy=strategy, **options)
    assert job.finish() == [0] * count, job.said()
    return job


def weights(root: Path) -> dict[str, torch.Tensor]:
    """What the finished run below ``root`` learned: the exported model (averaged), and all of its last checkpoint.

    So the weights of the last step, the optimiser's state and the temperatures are compared too.
    """
    latest = root / "run" / "latest"
    found = load_file(latest / "model" / "model.safetensors")
    step, path = checkpoints_newest_first(latest / "checkpoints")[0]
    assert step == STEPS
    state = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    found |= {f"checkpoint.{name}": value for name, value in state["state_dict"].items()}
    found |= {f"average.{name}": value for name, value in state["average"]["tensors"].items()}
    for index, entry in state["optimizer_states"][0]["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    return found


def curve(root: Path) -> list[float]:
    """The losses of ``metrics.csv``, one a step, every step once."""
    with open(root / "run" / "latest" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    return [float(row["train/loss"]) for row in rows]


def assert_same_run(root: Path, reference: Path) -> None:
    """Bit for bit: weights, optimiser state and every loss."""
    found, wanted = weights(root), weights(reference)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert curve(root) == curve(reference)


def assert_close_run(root: Path, reference: Path) -> None:
    """To 1e-5, but for a bias that the norm after it takes out again: its gradient is rounding alone.

    Batch norm subtracts the bias before it along with the mean, so their running means are compared without it.
    """
    found, wanted = weights(root), weights(reference)
    names = [
        n for n in wanted if n in found and not n.startswith("optimizer.") and "mlp_inter.fc2.bias" not in n
    ]
    far = {}
    for name in names:
        mine, theirs = found[name].double(), wanted[name].double()
        bias = name.removesuffix("1.running_mean") + "0.bias"
        if bias != name and bias in wanted:
            mine, theirs = mine - found[bias], theirs - wanted[bias]
        far[name] = float((mine - theirs).abs().max())
    assert max(far.values()) < 1e-5, sorted(far.items(), key=lambda item: -item[1])[:5]
    assert curve(root) == pytest.approx(curve(reference), rel=1e-5)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The root of a run that nothing happened to; made once for each kind."""
    made: dict[str, Path] = {}

    def make(
        world: World,
        *extra: str,
        count: int = 2,
        strategy: str = "ddp",
        fault: Fault | None = None,
        tag: str = "",
    ) -> Path:
        key = json.dumps([world.objective, str(world.data), extra, count, strategy, tag])
        if key not in made:
            root = tmp_path_factory.mktemp("uninterrupted")
            job = train(world, root, *extra, count=count, strategy=strategy, fault=fault)
            assert job.finish() == [0] * count, job.said()
            made[key] = root
        return made[key]

    return make


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[None]:
    """A file system of its own in a folder: a tmpfs, which takes the right to mount one."""
    import subprocess

    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(
            "no right to mount a tmpfs: run this suite as root, or under `unshare --user --map-root-user --mount`"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
