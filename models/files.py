"""Writing files and folders so that they are there whole or not at all: the one way of the whole product.

What is written lies beside its final name under a hidden one until it is synced, and is then renamed. The hidden
name is made exclusively and cannot be guessed, so nothing planted there is written through. It names the host and the
process that writes, ``.NAME.HOST~PID-START~RANDOM.tmp``: what a killed process left behind is swept by the next start
in its folder (:func:`sweep`), and only that; processes of other hosts are not judged. Modes follow the umask.

Where the system refuses (no room, no right, a read-only disk), :class:`NotWrittenError` says so in one sentence.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NAME = re.compile(r"\..*\.([A-Za-z0-9_-]{1,40})~(\d+)-(\d+)~[0-9a-f]{16}\.tmp", re.DOTALL)
_LONGEST_NAME = 255
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written to by this user",
}
_REFUSED |= {errno.EPERM: _REFUSED[errno.EACCES], errno.EFBIG: "the file is larger than the system allows"}


class NotWrittenError(OSError, ValueError):
    """A file or folder that cannot be written, for the user to mend: no room, no right, a read-only disk."""


def host_name() -> str:
    """This machine's name as it stands in file names."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40] or "localhost"


def process_start(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None where there is none, or only its zombie.

    With its number it names a process for good: numbers come again, in containers after every restart.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])


def is_alive(pid: int, start: int) -> bool:
    """Whether the process of that number and start still runs on this machine."""
    return process_start(pid) == start


def hidden_name(target: Path) -> Path:
    """A name beside ``target`` that no one can guess and that says who writes there."""
    pid = os.getpid()
    tail = f".{host_name()}~{pid}-{process_start(pid) or 0}~{secrets.token_hex(8)}.tmp"
    name = os.fsdecode(os.fsencode(target.name)[: _LONGEST_NAME - len(tail) - 1])
    return target.with_name(f".{name}{tail}")


def sweep(folder: str | Path) -> list[Path]:
    """Remove what processes of this machine that run no more left unfinished in a folder; what was removed.

    Nothing below its subfolders is looked at, and nothing that another machine or a living process makes.
    """
    swept = []
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None or match[1] != host_name() or is_alive(int(match[2]), int(match[3])):
            continue
        path = Path(folder) / name
        discard(path)
        swept.append(path)
    return swept


def discard(path: Path) -> None:
    """Delete a file or a folder if it is there; links are not followed."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)
    except OSError:
        pass


def write_atomically(path: str | Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write a file so that it appears whole or not at all, also when power fails.

    Args:
        data: a text is written in UTF-8.
        sync: wait for the disk; without it a power failure may leave the file before, or none.

    Raises:
        NotWrittenError: no room or no right; what was there before stays.
    """
    content = data.encode() if isinstance(data, str) else data
    with open_atomically(path, needed=len(content), sync=sync) as file:
        file.write(content)


@contextmanager
def open_atomically(path: str | Path, *, needed: int | None = None, sync: bool = True) -> Iterator[Any]:
    """A binary file that appears under ``path`` when the block ends well; otherwise nothing of it stays.

    Args:
        needed: bytes that will be written, for the message where they do not fit.

    Raises:
        NotWrittenError: no room or no right, also where a library has made another error of it.
    """
    target = Path(path)
    staged = hidden_name(target)
    file = None
    with _writing(target, needed, lambda: file.failure if file else None):
        try:
            file = StagedFile(staged)
            yield file
            file.finish(sync)
            os.replace(staged, target)
            if sync:
                sync_path(target.parent)
        except BaseException:
            if file is not None:
                file.close()
                discard(staged)
            raise


class StagedFile:
    """A new file under a hidden name; remembers why a write failed, which libraries do not always pass on."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.path = path
        self.failure: OSError | None = None
        self._file = os.fdopen(os.open(path, flags, 0o666), "w+b", buffering=1 << 20)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            self.failure = error
            raise

    def write(self, data: Any) -> int:
        return self._try(lambda: self._file.write(data))

    def flush(self) -> None:
        self._try(self._file.flush)

    def finish(self, sync: bool = True) -> None:
        """Bring everything to the disk and close."""
        self.flush()
        if sync:
            self._try(lambda: os.fsync(self._file.fileno()))
        self._try(self._file.close)

    def close(self) -> None:
        """Close, whatever is still unwritten."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def make_staging(target: str | Path) -> Path:
    """Make the hidden folder in which ``target`` is prepared; :func:`put_in_place` or :func:`discard` ends it.

    What dead processes left beside it is swept first.
    """
    target = Path(target)
    staged = hidden_name(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        staged.mkdir()
    return staged


def put_in_place(staged: Path, target: Path) -> None:
    """Bring a prepared folder to the disk and under its name; a folder of that name is gone afterwards."""
    for root, _, names in os.walk(staged):
        for name in names:
            sync_path(os.path.join(root, name))
        sync_path(root)
    if os.path.lexists(target):
        old = hidden_name(target)
        os.rename(target, old)
        try:
            os.rename(staged, target)
        except BaseException:
            os.rename(old, target)
            raise
        discard(old)
    else:
        os.rename(staged, target)
    sync_path(target.parent)


@contextmanager
def staged_folder(target: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """An empty folder that stands under ``target``, in the place of what was there, when the block ends well.

    Raises:
        NotWrittenError: no room or no right; what was there before stays, and nothing else.
    """
    target = Path(target)
    staged = make_staging(target)
    try:
        with writing(target, needed):
            yield staged
            put_in_place(staged, target)
    except NotWrittenError as error:  # of a file inside: no one knows the hidden folder
        raise NotWrittenError(str(error).replace(str(staged), str(target))) from error
    finally:
        discard(staged)


def sync_path(path: str | Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_mode() -> int:
    """The mode that a new file has under this process's umask, for files that a library makes private."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        mask = int(text.partition("Umask:")[2].split()[0], 8)
    except (OSError, ValueError, IndexError):
        mask = os.umask(0o077)
        os.umask(mask)
    return 0o666 & ~mask


def free_bytes(folder: str | Path) -> int | None:
    """Bytes that this user may still write where a folder is or would be; None where the system does not say."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        found = os.statvfs(place)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def check_room(path: str | Path, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        NotWrittenError: fewer than ``needed`` bytes are free where ``path`` would lie.
    """
    free = free_bytes(Path(path).parent)
    if free is not None and free < needed:
        raise _no_room(Path(path), needed)


@contextmanager
def writing(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn a refusal of the system inside the block into a :class:`NotWrittenError` that names ``path``.

    Args:
        needed: bytes that the block writes, where that is known.
    """
    with _writing(Path(path), needed, lambda: None):
        yield


@contextmanager
def _writing(path: Path, needed: int | None, cause: Callable[[], OSError | None]) -> Iterator[None]:
    try:
        yield
    except NotWrittenError:
        raise
    except Exception as error:
        number = refusal(cause()) or refusal(error, path.parent)
        if number in _FULL:
            raise _no_room(path, needed) from error
        if number is not None:
            raise NotWrittenError(
                f"cannot write {path}: {_REFUSED[number]}; give another place or mend its rights."
            ) from error
        raise


def refusal(error: BaseException | None, folder: Path | None = None) -> int | None:
    """The number of the system's refusal behind an error, also one of a library that passes on its text alone.

    Args:
        folder: a refusal of rights outside of it is another matter: a source that may not be read, say.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in _FULL or (error.errno in _REFUSED and _is_on_the_way(error.filename, folder)):
                return error.errno
            if error.filename is not None:  # its text has the number too
                return None
        said = str(error)
        for number in (*_FULL, *_REFUSED):
            if f"os error {number})" in said or f"[Errno {number}]" in said:
                return number
        error = error.__cause__ or error.__context__
    return None


def _is_on_the_way(name: Any, folder: Path | None) -> bool:
    if folder is None or not isinstance(name, (str, bytes)):
        return True
    place, wanted = Path(os.path.abspath(os.fsdecode(name))), Path(os.path.abspath(folder))
    return place.is_relative_to(wanted) or wanted.is_relative_to(place)


def _no_room(path: Path, needed: int | None) -> NotWrittenError:
    free = free_bytes(path.parent)
    wants = f"{needed:,} bytes are needed" if needed is not None else "more bytes are needed"
    has = f", {free:,} are free" if free is not None else ""
    return NotWrittenError(
        f"No space left on device: cannot write {path}, {wants}{has}; free some space or give another place."
    )
