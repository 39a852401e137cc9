"""Damaged checkpoints and shards, other numbers of ranks: what a resumed run reads is right or refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.train.checkpointing.folder import checkpoints_newest_first
from interloom.train.objectives.idefics.objective import IdeficsModule

from .conftest import (
    STRATEGIES,
    World,
    assert_close_run,
    assert_same_run,
    idefics_overrides,
    resume,
    train,
)

Reference = Callable[..., Path]


def flip(path: Path, place: float = 0.5) -> None:
    """Change some bytes in the middle of a file, but not its length."""
    data = bytearray(path.read_bytes())
    start = int(len(data) * place)
    for index in range(start, min(start + 64, len(data))):
        data[index] ^= 0x5A
    path.write_bytes(data)


def killed(world: World, root: Path, step: int, *extra: str, count: int = 2, strategy: str = "ddp") -> Path:
    """A run that lost a rank after ``step``; its folder of checkpoints, of which there are two."""
    job = train(world, root, *extra, count=count, strategy=strategy)
    job.wait_for_step(step)
    job.send(signal.SIGKILL, count - 1)
    assert -signal.SIGKILL in job.finish(), job.said()
    folder = job.latest / "checkpoints"
    assert len(checkpoints_newest_first(folder)) == 2
    return folder


@pytest.mark.parametrize(
    ("strategy", "how"), [("ddp", "flipped"), ("ddp", "truncated"), ("fsdp2", "flipped")]
)
def test_the_newest_checkpoint_is_damaged(
    world: World, tmp_path: Path, uninterrupted: Reference, strategy: str, how: str
) -> None:
    folder = killed(world, tmp_path, 7, strategy=strategy)
    newest = checkpoints_newest_first(folder)[0][1]
    file = newest if newest.is_file() else newest / "__1_0.distcp"  # the part of rank 1
    if how == "flipped":
        flip(file)
    else:
        file.write_bytes(file.read_bytes()[:-100])
    job = resume(world, tmp_path, strategy=strategy)
    assert f"{newest.name} is damaged" in job.said()
    assert_same_run(tmp_path, uninterrupted(world, strategy=strategy))


def test_killed_while_shards_are_saved(world: World, tmp_path: Path, uninterrupted: Reference) -> None:
    """Rank 0 dies with all parts written but the directory not yet in place."""

    def fault(rank: int) -> None:
        from interloom.train.checkpointing import sharded as sharded_checkpoint

        saves = 0
        put = sharded_checkpoint.put_in_place

        def save(*arguments: object) -> None:
            nonlocal saves
            saves += 1
            if saves == 2 and rank == 0:
                signal.raise_signal(signal.SIGKILL)
            put(*arguments)  # type: ignore[arg-type]

        sharded_checkpoint.put_in_place = save  # type: ignore[assignment]

    job = train(world, tmp_path, strategy="fsdp2", fault=fault)
    assert job.finish()[0] == -signal.SIGKILL, job.said()
    assert [step for step, _ in checkpoints_newest_first(job.latest / "checkpoints")] == [3]
    resume(world, tmp_path, strategy="fsdp2")
    assert_same_run(tmp_path, uninterrupted(world, strategy="fsdp2"))
    assert not list((job.latest / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_sharded_runs_stop_and_resume(
    world: World, tmp_path: Path, uninterrupted: Reference, number: int
) -> None:
    job = train(world, tmp_path, strategy="fsdp2")
    job.wait_for_step(5)
    job.send(number, 1)
    codes = job.finish()
    assert codes == [143, 143] if number == signal.SIGTERM else codes[1] == -number, job.said()
    resume(world, tmp_path, strategy="fsdp2")
    assert_same_run(tmp_path, uninterrupted(world, strategy="fsdp2"))


# Ranks and strategy before and after.
MOVES = {
    "groupvit": [
        ((2, "ddp"), (1, "ddp")),
        ((1, "ddp"), (2, "ddp")),
        ((2, "ddp"), (4, "ddp")),
        ((2, "ddp"), (2, "fsdp2")),
        ((2, "fsdp2"), (1, "ddp")),
        ((4, "fsdp2"), (2, "fsdp2")),
    ],
    "idefics": [((1, "ddp"), (2, "fsdp2")), ((2, "fsdp2"), (1, "ddp")), ((4, "ddp"), (2, "ddp"))],
}


@pytest.mark.parametrize(
    ("objective", "before", "after"),
    [(objective, *move) for objective, moves in MOVES.items() for move in moves],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]} {value[1]}",
)
def test_resumed_on_another_number_of_ranks(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    uninterrupted: Reference,
    objective: str,
    before: tuple[int, str],
    after: tuple[int, str],
) -> None:
    world = request.getfixturevalue(objective)
    killed(world, tmp_path, 7, count=before[0], strategy=before[1])
    resume(world, tmp_path, count=after[0], strategy=after[1])
    assert_close_run(tmp_path, uninterrupted(world, count=1))


def test_twice_resumed(world: World, tmp_path: Path, uninterrupted: Reference) -> None:
    for step, number in ((2, signal.SIGTERM), (5, signal.SIGKILL), (8, signal.SIGTERM)):
        job = train(world, tmp_path, "ckpt_path=last", "data.workers=1")
        job.wait_for_step(step)
        job.send(number, 0)
        job.finish()
    resume(world, tmp_path)
    assert_same_run(tmp_path, uninterrupted(world))


def with_data(world: World, folder: Path) -> World:
    """The world over a copy of its shards."""
    shutil.copytree(world.data, folder)
    swapped = [o.replace(str(world.data), str(folder)) for o in world.overrides]
    assert swapped != world.overrides
    return World(world.objective, folder, swapped)


def test_a_shard_with_broken_samples(world: World, tmp_path: Path, uninterrupted: Reference) -> None:
    """Samples that no longer match their checksum are left out and counted, the same ones by whoever resumes."""
    hurt = with_data(world, tmp_path / "shards")
    shard = sorted(hurt.data.glob("*.tar"))[0]
    for place in (0.3, 0.5):
        flip(shard, place)
    reference = uninterrupted(hurt)
    killed(hurt, tmp_path / "runs", 7)
    job = resume(hurt, tmp_path / "runs")
    assert "checksum differs" in job.said()
    assert_same_run(tmp_path / "runs", reference)
    assert_close_run(tmp_path / "runs", uninterrupted(hurt, count=1))


def test_a_shard_truncated_between_stop_and_resume(
    world: World, tmp_path: Path, uninterrupted: Reference
) -> None:
    """Its samples are missed loudly; with the shard back the run goes on from before as if nothing had been."""
    hurt = with_data(world, tmp_path / "shards")
    root = tmp_path / "runs"
    newest = checkpoints_newest_first(killed(hurt, root, 7))[0][1]
    shard = sorted(hurt.data.glob("*.tar"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    job = resume(hurt, root, "callbacks.checkpoint.keep=9")
    assert f"truncated shard ({len(whole) // 2} bytes, index says {len(whole)})" in job.said()
    assert "× truncated shard" in job.said()
    shard.write_bytes(whole)
    resume(hurt, root, f"ckpt_path={newest}")
    assert_same_run(root, uninterrupted(hurt))


@pytest.mark.parametrize("count", [2, 4])
def test_uneven_shards(groupvit: World, tmp_path: Path, uninterrupted: Reference, count: int) -> None:
    """Three shards of 27, 10 and 3 samples, read by 2 and 4 ranks of two workers each."""
    uneven = World("groupvit", uneven_shards(groupvit.data, tmp_path / "shards"), [])
    uneven.overrides[:] = [
        *(o.replace(str(groupvit.data), str(uneven.data)) for o in groupvit.overrides),
        "data.workers=2",
    ]
    killed(uneven, tmp_path / "runs", 7, count=count)
    resume(uneven, tmp_path / "runs", count=count)
    assert_same_run(tmp_path / "runs", uninterrupted(uneven, count=count))
    assert_close_run(tmp_path / "runs", uninterrupted(uneven, count=1))


def uneven_shards(source: Path, folder: Path) -> Path:
    """The samples of the shards in ``source``, cut into three of unlike length."""
    import itertools
    import tarfile

    from interloom.train.data.shards.writer import ShardFile

    members: dict[str, dict[str, bytes]] = {}
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                stem, extension = member.name.split(".", 1)
                file = archive.extractfile(member)
                assert file is not None
                members.setdefault(stem, {})[extension] = file.read()
    samples = iter(members.items())
    for number, count in enumerate((27, 10, len(members) - 37)):
        with ShardFile(folder / f"{number:06d}.tar") as shard:
            for stem, parts in itertools.islice(samples, count):
                shard.add(stem, parts)
    return folder


def text_and_pictures(folder: Path) -> World:
    """Documents of which two thirds have no picture; one sequence a rank on two ranks."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from interloom.train.data.documents.build import convert
    from interloom.train.data.documents.options import ConvertOptions
    from interloom.train.data.documents.records import Filters
    from interloom.train.data.drawn.documents import records, write_tokenizer

    rows = list(records(3, range(90)))
    for number, row in enumerate(rows):
        if number % 3:
            row["texts"] = [text for text in row["texts"] if text]
            row["images"] = [None] * len(row["texts"])
            row["metadata"] = json.dumps([None] * len(row["texts"]))
            row["general_metadata"] = "{}"
    schema = pa.schema([("images", pa.list_(pa.binary())), ("texts", pa.list_(pa.string()))])
    schema = schema.append(pa.field("metadata", pa.string())).append(
        pa.field("general_metadata", pa.string())
    )
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rows.parquet")
    write_tokenizer(folder / "tokenizer")
    options = ConvertOptions(str(folder / "tokenizer"), filters=Filters.none())
    convert(str(folder / "rows.parquet"), folder / "shards", options, workers=1)
    settings = [
        o for o in idefics_overrides(folder / "shards", folder / "tokenizer") if "max_tokens" not in o
    ]
    return World("idefics", folder / "shards", [*settings, "data.max_tokens=48", "data.batch_size=2"])


def test_a_rank_without_images(tmp_path: Path, uninterrupted: Reference) -> None:
    """Of two ranks with one sequence each, one often has text alone: the other does not wait for it."""
    mixed = text_and_pictures(tmp_path / "documents")
    seen = tmp_path / "seen"

    def note(rank: int) -> None:
        whole = IdeficsModule.backward_step

        def backward_step(self: Any, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
            with open(f"{seen}{rank}", "a") as file:
                file.write("x" if batch["image_valid"].any() else "-")
            return whole(self, batch, step)

        IdeficsModule.backward_step = backward_step  # type: ignore[method-assign]

    uninterrupted(mixed, fault=note)
    pictures = [Path(f"{seen}{rank}").read_text() for rank in range(2)]
    alone = sum(mine != other for mine, other in zip(*pictures, strict=True))
    assert alone >= 3, pictures
    root = tmp_path / "runs"
    for strategy in STRATEGIES:
        killed(mixed, root / strategy, 7, strategy=strategy)
        resume(mixed, root / strategy, strategy=strategy)
        assert_same_run(root / strategy, uninterrupted(mixed, strategy=strategy))
        assert_close_run(root / strategy, uninterrupted(mixed, count=1))
