"""Files are there whole or not at all, whoever dies, whatever is planted and however full the disk is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interloom.models import files
from interloom.models.checkpoint import save_folder
from interloom.models.files import (
    NotWrittenError,
    check_room,
    hidden_name,
    open_atomically,
    staged_folder,
    sweep,
    write_atomically,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_planted_link_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a neighbour guesses the hidden name."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    hidden_name(tmp_path / "file").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "file").exists()


def test_two_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with open_atomically(tmp_path / "file") as one, open_atomically(tmp_path / "file") as two:
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "file").read_bytes() == b"one"  # the outer block ends last
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "text")
        with staged_folder(tmp_path / "folder") as staged:
            (staged / "inside").write_text("")
        save_folder(tmp_path / "model", {"w": torch.ones(2)}, "{}")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_leftovers_of_dead_processes_alone_are_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys; from interloom.models.files import hidden_name, make_staging; from pathlib import Path\n"
        f"hidden_name(Path({str(tmp_path)!r}) / 'file').write_bytes(b'half')\n"
        f"(make_staging(Path({str(tmp_path)!r}) / 'folder') / 'part').write_bytes(b'half')\n"
        "print(os.getpid(), flush=True); sys.stdin.read() if len(sys.argv) > 1 else os._exit(9)"
    )
    living = subprocess.Popen(
        [sys.executable, "-c", code, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert living.stdout is not None
    living.stdout.readline()
    of_living = names(tmp_path)
    assert len(of_living) == 2
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    mine = hidden_name(tmp_path / "mine")
    mine.write_bytes(b"still being written")
    other = of_living[0].replace(files.host_name(), "another-host").replace(f"~{living.pid}-", "~1-")
    (tmp_path / other).write_bytes(b"of another machine")
    (tmp_path / ".hidden.tmp").write_bytes(b"not ours at all")
    kept = sorted([*of_living, mine.name, other, ".hidden.tmp"])
    assert len(sweep(tmp_path)) == 2
    assert names(tmp_path) == kept
    living.kill()  # and not waited for: a zombie writes no more
    os.waitid(os.P_PID, living.pid, os.WEXITED | os.WNOWAIT)
    assert len(sweep(tmp_path)) == 2
    assert names(tmp_path) == sorted([mine.name, other, ".hidden.tmp"])
    living.communicate()


def test_a_number_that_came_again_does_not_protect_a_leftover(tmp_path: Path) -> None:
    """In a restarted container the new process has the number of the dead one."""
    name = hidden_name(tmp_path / "file").name
    start = files.process_start(os.getpid())
    (tmp_path / name.replace(f"-{start}~", f"-{start - 1}~")).write_bytes(b"half")
    assert len(sweep(tmp_path)) == 1


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    write_atomically(tmp_path / "file", "before")
    monkeypatch.setattr(where, full)
    with pytest.raises(NotWrittenError) as caught:
        write_atomically(tmp_path / "file", b"x" * 12345)
    assert "No space left on device" in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)
    assert "12,345 bytes are needed" in str(caught.value)
    assert (tmp_path / "file").read_text() == "before"
    assert names(tmp_path) == ["file"]


def test_the_library_that_hides_why_it_failed_is_seen_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch makes a RuntimeError about inline_container.cc of a full disk, safetensors an error with its number."""

    class Full:
        def __getattr__(self, name: str) -> Any:
            return full if name in {"write", "flush"} else lambda *_: None

    monkeypatch.setattr(files.os, "fdopen", lambda handle, *_, **__: (os.close(handle), Full())[1])
    said = r"No space left on device: cannot write .*file"
    with pytest.raises(NotWrittenError, match=said), open_atomically(tmp_path / "file") as file:
        torch.save({"w": torch.ones(1000)}, file)
    monkeypatch.undo()
    monkeypatch.setattr(
        "huggingface_hub.save_torch_state_dict",
        lambda *_, **__: (_ for _ in ()).throw(
            RuntimeError('I/O error: Os { message: "No space left on device (os error 28)" }')
        ),
    )
    with pytest.raises(NotWrittenError, match=r"cannot write .*model\.safetensors, 8 bytes are needed"):
        save_folder(tmp_path / "model", {"w": torch.ones(2)}, "{}")
    assert names(tmp_path) == []


def test_what_the_block_cannot_read_is_another_matter(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), open_atomically(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
    assert names(tmp_path) == []


def test_room_is_looked_at_before_anything_is_begun(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "yet" / "there", 10)
    with pytest.raises(NotWrittenError, match=f"{1 << 60:,} bytes are needed"):
        check_room(tmp_path / "not" / "yet" / "there", 1 << 60)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with staged_folder(target) as staged:
            (staged / content).write_text(content)
        assert names(tmp_path) == ["model"]
        assert names(target) == [content]
    with (
        pytest.raises(NotWrittenError, match=f"cannot write {target}/inside"),
        staged_folder(target) as staged,
    ):
        raise NotWrittenError(f"cannot write {staged}/inside")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["two"]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    name = "é" * 127
    write_atomically(tmp_path / name, b"")
    assert names(tmp_path) == [name]
