"""Ranks, strategies and accumulation change nothing: the same losses and weights in float32, to 1e-5, 20 steps long.

Every case is a run of the command on tiny models; all cases of one rank count share one process group. A part is in
`make test`, the grid in `make test-faults`.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.train.checkpointing.folder import AtomicCheckpointIO, checkpoints_newest_first
from interloom.train.checkpointing.load import load_pretrained
from interloom.train.cli import main
from interloom.train.data.drawn.documents import write_demo
from interloom.train.objectives.groupvit.objective import GroupViTModule
from interloom.train.objectives.idefics.objective import IdeficsModule

STEPS = 20
STOP = 8  # the step a stopped run has done
# The norm after it takes this bias out again: its gradient is rounding alone, which Adam blows up.
ROUNDING = ("mlp_inter.fc2.bias",)

GROUPVIT = ["model.config.vision_config.drop_path_rate=0.2"]
IDEFICS = [
    "model=idefics",
    "data=documents",
    "data.max_tokens=64",
    "data.image_size=32",
    "data.crop_scale=null",
    "data.batch_size=8",
    "data.workers=0",
    "model.z_loss=0.001",
    "model.config.vocab_size=128",
    "model.config.additional_vocab_size=2",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.cross_layer_interval=1",
    "model.config.num_attention_heads=2",
    "model.config.alpha_initializer=ones",
    "model.config.pad_token_id=3",
    "model.config.perceiver_config.resampler_depth=1",
    "model.config.perceiver_config.resampler_n_latents=4",
    "model.config.perceiver_config.resampler_n_heads=2",
    "model.config.perceiver_config.resampler_head_dim=8",
    "model.config.vision_config.embed_dim=16",
    "model.config.vision_config.image_size=32",
    "model.config.vision_config.patch_size=16",
    "model.config.vision_config.intermediate_size=32",
    "model.config.vision_config.num_hidden_layers=1",
    "model.config.vision_config.num_attention_heads=2",
]
TRAINED = ["model.config.freeze_text_layers=false", "model.config.freeze_vision_layers=false"]
FROZEN = [
    "model.config.freeze_text_layers=true",
    "model.config.freeze_vision_layers=true",
    "model.gradient_checkpointing=true",
]
# What is trained, by name: contrastive negatives, multi-label loss and batch statistics in the first two,
# token-weighted sums, z-loss, two sources and ranks without images in the others.
OBJECTIVES = {
    "groupvit": GROUPVIT,
    "groups": [*GROUPVIT, "model.multi_label_objective=groups", "model.share_identical=true"],
    "idefics": [*IDEFICS, *TRAINED],
    "frozen": [*IDEFICS, *FROZEN],
    "tied": [*IDEFICS, *TRAINED, "model.config.tie_word_embeddings=true", "model.config.dropout=0.1"],
    "adapters": [
        *IDEFICS,
        *FROZEN,
        "model.lora={rank: 2, parts: both, dropout: 0.2}",
        "model.config.vision_config.attention_dropout=0.1",
    ],
}


@dataclass(frozen=True)
class Run:
    """One run of the command, in ``root/<label>``."""

    label: str
    objective: str
    strategy: str
    micro: int | None = None
    extra: tuple[str, ...] = ()
    stopped: bool = False
    steps: int = STEPS

    def arguments(self, bench: Bench, ranks: int) -> list[str]:
        return [
            "train",
            *(bench.documents if "model=idefics" in OBJECTIVES[self.objective] else bench.pairs),
            *OBJECTIVES[self.objective],
            "name=equal",
            f"runs_dir={bench.root / self.label}",
            f"trainer.max_steps={self.steps}",
            "optim.clip_norm=1.0",
            "optim.eps=1e-3",
            "optim.ema_decay=0.9",
            "callbacks.log_every=1",
            "callbacks.progress=false",
            *(() if ranks == 1 else (f"trainer={self.strategy}", f"trainer.devices={ranks}")),
            "trainer.accelerator=cpu",
            f"trainer.micro_batch_size={'null' if self.micro is None else self.micro}",
            *self.extra,
        ]


@dataclass
class Bench:
    """Where the runs are made and the data they train on."""

    root: Path
    pairs: list[str]
    documents: list[str]
    fork_ranks: Callable[..., None]

    def latest(self, label: str) -> Path:
        return self.root / label / "equal" / "latest"

    def one_process(self, run: Run) -> None:
        if not (self.root / run.label).exists():
            assert main(run.arguments(self, 1)) == 0

    def on_ranks(self, count: int, runs: list[Run]) -> None:
        """All runs, one after another, in one group of processes."""

        def work(rank: int) -> None:
            for run in runs:
                with stop_request(run, rank):
                    assert main(run.arguments(self, count)) == (143 if run.stopped else 0), run.label

        self.fork_ranks(work, count, timeout=900)

    def losses(self, label: str) -> list[float]:
        with open(self.latest(label) / "metrics.csv") as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file)]

    def final(self, label: str) -> dict[str, torch.Tensor]:
        """Weights, moments and averages of the last checkpoint, and the exported weights, by name."""
        path = checkpoints_newest_first(self.latest(label) / "checkpoints")[0][1]
        state = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
        (optimizer,) = state["optimizer_states"]
        found = dict(state["state_dict"])
        for name, entry in optimizer["state"].items():
            found |= {f"{key} of {name}": torch.as_tensor(value) for key, value in entry.items()}
        found |= {f"average of {name}": value for name, value in state["average"]["tensors"].items()}
        exported, _ = load_pretrained(self.latest(label) / "model")
        return found | {f"exported {name}": value for name, value in exported.state_dict().items()}

    def assert_equal(self, label: str, reference: str) -> None:
        """To 1e-5, as sums in another order allow."""
        assert self.losses(label) == pytest.approx(self.losses(reference), rel=1e-5), label
        found, wanted = self.final(label), self.final(reference)
        # A weight whose gradient was None in one run and zeros in another has moments in the other alone.
        assert set(wanted) <= set(found), set(wanted) - set(found)
        assert not any(
            found[name].any() for name in set(found) - set(wanted) if not name.startswith("step of")
        )
        compared = [name for name in wanted if not name.endswith(ROUNDING)]
        far = {name: float((found[name] - wanted[name]).abs().max()) for name in compared}
        assert max(far.values()) < 1e-5, (label, sorted(far.items(), key=lambda item: -item[1])[:5])

    def assert_same(self, label: str, reference: str) -> None:
        """Bit for bit: losses, weights, moments, averages."""
        assert self.losses(label) == self.losses(reference)
        found, wanted = self.final(label), self.final(reference)
        assert found.keys() == wanted.keys()
        assert not [name for name in wanted if not torch.equal(found[name], wanted[name])]


class stop_request:
    """Asks the run to stop, by SIGTERM to rank 0 in its ``STOP``-th step."""

    def __init__(self, run: Run, rank: int) -> None:
        self.wanted = run.stopped and rank == 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        if not self.wanted:
            return
        for kind in (GroupViTModule, IdeficsModule):
            whole = kind.backward_step

            def backward_step(self: Any, batch: Any, step: int, whole: Any = whole) -> Any:
                if step == STOP - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return whole(self, batch, step)

            self.patch.setattr(kind, "backward_step", backward_step)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def bench(
    tiny_world: Any, tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., None]
) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("equality")
    write_demo(root / "documents", train=60, val=8, seed=1)
    documents = [
        f"+data.sources.a=[{root / 'documents' / 'train'}]",
        f"+data.sources.b=[{root / 'documents' / 'val'}]",
        f"data.tokenizer={root / 'documents' / 'tokenizer'}",
    ]
    whole = IdeficsModule.backward_step

    def text_only(self: Any, batch: dict[str, Any], step: int) -> Any:
        """The second half of every global batch sees no image: the share of the last rank, or of the last two."""
        mask = batch["image_attention_mask"].clone()
        mask[batch["positions"] % 8 >= 4] = False
        return whole(self, {**batch, "image_attention_mask": mask}, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdeficsModule, "backward_step", text_only)
        yield Bench(
            root,
            [name for name in tiny_world.overrides if not name.startswith("trainer")],
            documents,
            fork_ranks,
        )


def references(bench: Bench, objectives: list[str]) -> None:
    for objective in objectives:
        bench.one_process(Run(f"one-{objective}", objective, "single"))


def check(bench: Bench, ranks: int, cases: list[tuple[str, str, int | None, tuple[str, ...]]]) -> None:
    """Each case (objective, strategy, micro-batch, further settings) on ``ranks`` against one process."""
    references(bench, [case[0] for case in cases])
    runs = [
        Run(
            "-".join(map(str, (ranks, *case[:3], "late" if case[3] else ""))),
            case[0],
            case[1],
            case[2],
            case[3],
        )
        for case in cases
    ]
    bench.on_ranks(ranks, runs)
    for run in runs:
        bench.assert_equal(run.label, f"one-{run.objective}")


def test_sharded_runs_train_like_one_process(bench: Bench) -> None:
    check(
        bench,
        2,
        [
            ("groupvit", "fsdp2", 3, ()),
            ("idefics", "fsdp2", 3, ()),
            ("frozen", "fsdp2", None, ()),
        ],
    )


def test_in_mixed_precision_a_sharded_run_trains_like_ddp(bench: Bench) -> None:
    """Matrices gathered in bfloat16 are those that autocast would make; all else stays float32."""
    mixed = ("trainer.precision=bf16-mixed", "model.frozen_dtype=bfloat16")
    runs = [Run(f"mixed-{s}", "frozen", s, 3, mixed, steps=6) for s in ("ddp", "fsdp2")]
    bench.on_ranks(2, runs)
    bench.assert_equal("mixed-fsdp2", "mixed-ddp")


LATE = ("trainer.reduce_every_pass=false",)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("objective", ["groupvit", "idefics"])
def test_ranks_strategies_and_accumulation_change_nothing(bench: Bench, objective: str, ranks: int) -> None:
    both = ("ddp", "fsdp2")
    cases = [(objective, strategy, micro, ()) for strategy in both for micro in (None, 1)]
    check(bench, ranks, [*cases, (objective, "fsdp2", 1, LATE)])


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("objective", ["groups", "frozen", "tied", "adapters"])
def test_other_objectives_too(bench: Bench, objective: str, ranks: int) -> None:
    if objective == "adapters":
        pytest.importorskip("peft")
    check(bench, ranks, [(objective, "fsdp2", 1, ()), (objective, "ddp", None, ())])


def resumed(bench: Bench, objective: str, ways: list[tuple[str, int, str]], steps: int) -> None:
    """Stop a run on two ranks under each strategy; continue it in each way (from strategy, ranks, to strategy).

    It must end like one process, and bit for bit like the uninterrupted run of the same ranks and strategy.
    """
    one = Run(f"one-{steps}-{objective}", objective, "single", steps=steps)
    bench.one_process(one)
    strategies = sorted({way[0] for way in ways})
    whole = [
        Run(f"whole-{steps}-{before}-{objective}", objective, before, 2, steps=steps)
        for before, ranks, after in ways
        if (ranks, after) == (2, before)
    ]
    stopped = {
        s: Run(f"stopped-{steps}-{s}-{objective}", objective, s, 2, stopped=True, steps=steps)
        for s in strategies
    }
    bench.on_ranks(2, [*whole, *stopped.values()])
    for count in sorted({way[1] for way in ways}):
        continued = []
        for before, ranks, after in ways:
            if ranks != count:
                continue
            label = f"{stopped[before].label}-on-{count}-{after}"
            shutil.copytree(bench.root / stopped[before].label, bench.root / label, symlinks=True)
            kept = checkpoints_newest_first(bench.latest(label) / "checkpoints")
            assert [(step, path.suffix) for step, path in kept] == [(STOP, SUFFIXES[before])]
            continued.append(Run(label, objective, after, 2, ("ckpt_path=last",), steps=steps))
        if count == 1:
            for run in continued:
                assert main(run.arguments(bench, 1)) == 0
        else:
            bench.on_ranks(count, continued)
        for run in continued:
            step, path = checkpoints_newest_first(bench.latest(run.label) / "checkpoints")[0]
            assert (step, path.suffix) == (steps, SUFFIXES[run.strategy])
            assert len(bench.losses(run.label)) == steps
            bench.assert_equal(run.label, one.label)
    for run in whole:
        bench.assert_same(f"{stopped[run.strategy].label}-on-2-{run.strategy}", run.label)


SUFFIXES = {"single": ".ckpt", "ddp": ".ckpt", "fsdp2": ".shards"}


def test_a_stopped_run_goes_on_under_another_strategy_and_on_one_process(bench: Bench) -> None:
    ways = [("fsdp2", 2, "fsdp2"), ("fsdp2", 2, "ddp"), ("ddp", 2, "fsdp2"), ("fsdp2", 1, "single")]
    resumed(bench, "groupvit", ways, steps=12)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("objective", ["groupvit", "idefics"])
def test_a_stopped_run_goes_on_on_any_number_of_ranks(bench: Bench, objective: str) -> None:
    ways = [
        (before, ranks, after)
        for before in ("ddp", "fsdp2")
        for ranks in (1, 2, 4)
        for after in (("ddp", "fsdp2") if ranks > 1 else ("single",))
    ]
    resumed(bench, objective, ways, steps=STEPS)
