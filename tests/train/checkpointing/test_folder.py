"""Checkpoint files: whole or not at all, damage found, the one before kept."""

from __future__ import annotations

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
from interloom.train.checkpointing.load import load_pretrained, read_state


class FakeTrainer(SimpleNamespace):
    """As much of a Trainer as the callback asks for."""

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        AtomicCheckpointIO().save_checkpoint({"step": self.global_step, "w": torch.ones(50)}, path)


def trainer_at(step: int) -> Any:
    return FakeTrainer(global_step=step, is_global_zero=True)


def run(callback: CheckpointCallback, steps: int) -> None:
    callback.on_train_start(trainer_at(0), None)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        callback.on_train_batch_end(trainer_at(step), None, None, None, step)  # type: ignore[arg-type]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    callback = CheckpointCallback(tmp_path, every_steps=3, keep=2)
    run(callback, 10)
    assert [step for step, _ in checkpoints_newest_first(tmp_path)] == [9, 6]
    callback.on_train_end(trainer_at(10), None)  # type: ignore[arg-type]
    assert [step for step, _ in checkpoints_newest_first(tmp_path)] == [10, 9]


def test_a_save_that_dies_half_way_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(CheckpointCallback(tmp_path, every_steps=1, keep=2), 1)

    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("interloom.train.callbacks.checkpoint.torch.save", half)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / checkpoint_name(2))
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_name(1)]


def test_a_full_disk_is_reported_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = CheckpointCallback(tmp_path, every_steps=1, keep=2)
    run(callback, 2)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    callback.on_train_batch_end(trainer_at(3), None, None, None, 3)  # type: ignore[arg-type]
    assert "No space left on device" in capsys.readouterr().err
    assert [step for step, _ in checkpoints_newest_first(tmp_path)] == [2, 1]
    with pytest.raises(OSError, match="No space left"):
        callback.on_train_end(trainer_at(3), None)  # type: ignore[arg-type]


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000004.ckpt.99.tmp").write_bytes(b"half")
    run(CheckpointCallback(tmp_path, every_steps=1, keep=2), 1)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint_name(1)]


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(CheckpointCallback(tmp_path, every_steps=1, keep=2), 2)
    newest = tmp_path / checkpoint_name(2)
    data = bytearray(newest.read_bytes())
    if how == "flipped":
        # In the middle of the weights, where torch.load itself would not notice.
        place = data.index(torch.ones(4).numpy().tobytes())
        data[place + 2] ^= 0x40
    newest.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "empty": b""}[how])
    assert newest_sound_checkpoint(tmp_path) == tmp_path / checkpoint_name(1)
    assert "step-00000002.ckpt is damaged" in capsys.readouterr().err


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Anywhere in the file: the archive's own directory has no checksum, and flips there look like other formats."""
    path = tmp_path / checkpoint_name(1)
    values = {"step": 7, "w": torch.arange(20.0), "nested": {"b": torch.ones(3)}}
    AtomicCheckpointIO().save_checkpoint(values, path)
    whole = path.read_bytes()
    found = 0
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 1 << (place % 8)
        path.write_bytes(data)
        if damage(path) is not None:
            found += 1
            continue
        read = torch.load(path, weights_only=True)
        assert read["step"] == 7
        assert torch.equal(read["w"], values["w"])
        assert torch.equal(read["nested"]["b"], values["nested"]["b"])
    assert found > len(whole) // 6


def test_sound_files_have_no_damage(tmp_path: Path) -> None:
    run(CheckpointCallback(tmp_path, every_steps=1, keep=2), 1)
    assert damage(tmp_path / checkpoint_name(1)) is None
    assert newest_sound_checkpoint(tmp_path / "nowhere") is None


class Attack:
    def __reduce__(self) -> tuple:
        return (Path("attacked").touch, ())


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"interloom": Attack()}, "attack.ckpt")
    Path("attack.bin").write_bytes(pickle.dumps(Attack()))
    for name in ("attack.ckpt", "attack.bin"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read_state(Path(name))
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist; give a run directory"),
        (lambda p: p.mkdir(), "holds neither config.json"),
        (lambda p: torch.save({"weights": 1}, p), "was not written by this trainer"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pretrained(path)
