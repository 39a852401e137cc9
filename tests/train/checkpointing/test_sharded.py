"""Sharded checkpoint directories: whole or not at all, damage found, nothing executed, readable everywhere."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interloom.train.callbacks.checkpoint import CheckpointCallback
from interloom.train.checkpointing.folder import (
    AtomicCheckpointIO,
    checkpoint_name,
    checkpoints_newest_first,
    damage,
    newest_sound_checkpoint,
)
from interloom.train.checkpointing.load import load_pretrained, model_type
from interloom.train.checkpointing.sharded import open_sharded, read_sharded, save_sharded
from interloom.train.checkpointing.sharded_files import (
    INDEX,
    MARKER,
    STATE,
    checksum,
    read_index,
    write_marker,
)
from interloom.train.cli import main


def checkpoint(step: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "model.a": torch.randn(7, 5, generator=generator),
        "model.half": torch.randn(3, generator=generator).bfloat16(),
        "model.scale": torch.tensor(2.5),
        "model.count": torch.tensor(3),
        "model.none": torch.empty(0, 4),
    }
    moments = {"model.a": {"step": torch.tensor(4.0), "exp_avg": torch.randn(7, 5, generator=generator)}}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": []}],
        "global_step": step,
        "interloom": {"seed": 7, "family": "groupvit"},
    }


def saved(folder: Path, step: int = 1) -> Path:
    path = folder / checkpoint_name(step, sharded=True)
    save_sharded(checkpoint(step), path)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    found, wanted = read_sharded(path), checkpoint()
    assert found["global_step"] == 1
    assert found["interloom"] == wanted["interloom"]
    assert found["state_dict"].keys() == wanted["state_dict"].keys()
    for name, value in wanted["state_dict"].items():
        assert found["state_dict"][name].dtype == value.dtype
        assert torch.equal(found["state_dict"][name], value), name
    entry, moments = (c["optimizer_states"][0]["state"]["model.a"] for c in (found, wanted))
    assert all(torch.equal(entry[key], moments[key]) for key in ("step", "exp_avg"))
    assert read_sharded(path, optimizer=False)["optimizer_states"][0]["state"] == {}
    assert all(tensor.is_meta for tensor in open_sharded(path)["state_dict"].values())
    assert damage(path) is None


def test_a_directory_counts_when_its_marker_exists(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (saved(tmp_path, 2) / MARKER).unlink()
    assert [step for step, _ in checkpoints_newest_first(tmp_path)] == [1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("hurt", "message"),
    [
        (lambda p: flip(p / "__0_0.distcp"), "checksum of its file __0_0.distcp"),
        (lambda p: flip(p / STATE), "checksum of its file state.pt"),
        (lambda p: flip(p / INDEX), "checksum of its file .metadata"),
        (lambda p: os.truncate(p / "__0_0.distcp", 100), "has 100 bytes"),
        (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda p: (p / MARKER).write_text("{"), "COMPLETE cannot be read"),
        (lambda p: (p / MARKER).write_text('{"format": 1, "files": {}}'), "does not name"),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, hurt: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    hurt(newest)
    assert newest_sound_checkpoint(tmp_path) == before
    warning = capsys.readouterr().err
    assert f"{newest} is damaged" in warning
    assert message in warning
    with pytest.raises(ValueError, match="is damaged"):
        load_pretrained(newest)


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    flip(saved(tmp_path) / STATE)
    path = saved(tmp_path)
    assert damage(path) is None
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["dcp.save", "put_in_place"])
def test_a_save_that_fails_leaves_nothing_but_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = saved(tmp_path, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"interloom.train.checkpointing.sharded.{where}", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert damage(path) is None


def test_the_newest_are_kept_beside_files_and_leftovers_swept(tmp_path: Path) -> None:
    def save(path: Path, weights_only: bool) -> None:
        save_sharded(
            checkpoint(), path
        ) if path.suffix == ".shards" else AtomicCheckpointIO().save_checkpoint({}, path)

    def trainer(step: int) -> Any:
        return SimpleNamespace(global_step=step, is_global_zero=True, save_checkpoint=save)

    (tmp_path / ".step-00000009.shards.tmp").mkdir()
    (tmp_path / ".step-00000009.shards.tmp" / "__0_0.distcp").write_bytes(b"half")
    for sharded, steps in ((True, (1, 2)), (False, (3,)), (True, (4, 5))):
        callback = CheckpointCallback(tmp_path, every_steps=1, keep=2, sharded=sharded)
        callback.on_train_start(trainer(0), None)  # type: ignore[arg-type]
        for step in steps:
            callback.on_train_batch_end(trainer(step), None, None, None, step)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004.shards", "step-00000005.shards"]


class Attack:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return (self.call, self.arguments)


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch attacked"),
        Attack(eval, "open('attacked', 'w')"),
        Attack(Path.touch, Path("attacked")),
        Attack(torch.load, "attack.pt"),
    ],
)
def test_an_index_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Attack) -> None:
    path = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    index = read_index(path)
    index.planner_data = attack  # deep inside what is otherwise a good index
    (path / INDEX).write_bytes(pickle.dumps(index))
    # The marker of an attacker fits its files.
    write_marker(path, {p.name: checksum(p) for p in path.iterdir() if p.name != MARKER})
    assert damage(path) is None
    for read in (read_index, open_sharded, read_sharded, load_pretrained):
        with pytest.raises(ValueError, match="which no index does"):
            read(path)
    assert not Path("attacked").exists()


def test_plain_values_cannot_run_code_and_files_outside_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    index = read_index(path)
    for place in index.storage_data.values():
        place.relative_path = "../__0_0.distcp"
    (path / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="in its own files"):
        read_sharded(path)
    torch.save({"optimizer_counts": {}, "interloom": Attack(os.system, "touch attacked")}, path / STATE)
    with pytest.raises(ValueError, match="cannot be read as a sharded checkpoint"):
        read_sharded(path)
    assert not Path("attacked").exists()


def test_a_run_loads_and_goes_on_from_a_directory(tiny_world: Any, tmp_path: Path) -> None:
    """The same run's file, written anew as shards, is the same checkpoint to everything that reads one."""
    arguments = ["train", *tiny_world.overrides, "name=run", f"runs_dir={tmp_path}"]
    assert main([*arguments, "trainer.max_steps=4", "callbacks.checkpoint.every_steps=2"]) == 0
    folder = tmp_path / "run" / "latest" / "checkpoints"
    (_, end), (_, middle) = checkpoints_newest_first(folder)
    wanted = AtomicCheckpointIO().load_checkpoint(end, weights_only=True)
    weights = load_pretrained(middle)[0].state_dict()
    save_sharded(
        AtomicCheckpointIO().load_checkpoint(middle, weights_only=True), folder / "step-00000002.shards"
    )
    middle.unlink()
    end.unlink()
    model, _ = load_pretrained(folder / "step-00000002.shards")
    assert model_type(folder / "step-00000002.shards") == "groupvit"
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert main([*arguments, "trainer.max_steps=4", "ckpt_path=last"]) == 0
    found = AtomicCheckpointIO().load_checkpoint(end, weights_only=True)
    assert all(torch.equal(value, wanted["state_dict"][name]) for name, value in found["state_dict"].items())
    assert found["interloom"] == wanted["interloom"]
    old, new = (c["optimizer_states"][0]["state"] for c in (wanted, found))
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name][key], value) for name in old for key, value in old[name].items())
