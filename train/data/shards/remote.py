"""Reading what lies behind an address, through networks and servers as they are.

Every fault (refused, reset, cut short, silent, 403, 404, 5xx, throttled) is tried again with growing pauses for
``data.retry_seconds``, and counted; what still fails is an :class:`~interloom.train.messages.OutsideFault`, one
sentence that names the address. So no sample is lost to a network, and a run that goes on has the same bits.

Indexes are kept in ``$XDG_CACHE_HOME/interloom/indexes``, and never believed unseen: an index that a manifest lists is
kept under its SHA-256; of another one the header, which holds the digest of all that follows, is compared with the one
at the address.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from ...files import write_atomically, writing
from ...messages import OutsideFault
from .index import file_sha256

RETRY_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
# A server that says nothing for so long has hung.
_SILENCE = 30.0
_AT_ONCE = 32
_LONGEST_HEADER = 100 << 20
Result = TypeVar("Result")


class AddressError(ValueError):
    """An address of a kind that is not read, here or at all."""


class _Retries:
    """How often this process had to ask again since that was last looked at."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def take(self) -> int:
        with self._lock:
            count, self._count = self._count, 0
        return count


retries = _Retries()


def is_local(url: str) -> bool:
    """Whether a shard is a local file."""
    return "://" not in url


def masked(url: str) -> str:
    """An address that may be shown: without passwords and signed queries."""
    return re.sub(r"\?.*", "?…", re.sub(r"(://)[^/@]*@", r"\1***@", url))


def persistently(call: Callable[[], Result], url: str, seconds: float) -> Result:
    """What ``call`` returns, tried again for ``seconds`` while it fails.

    Raises:
        OutsideFault: it still fails.
        AddressError: the address is of no kind that can be read.
    """
    end, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            return call()
        except AddressError:
            raise
        except ImportError as error:
            raise AddressError(_not_installed(url, error)) from error
        except Exception as error:  # each file system has its own kinds, and none says which may pass
            left = end - time.monotonic()
            if left <= 0:
                raise OutsideFault(
                    f"{masked(url)} cannot be read ({reason_of(error)}), tried for {seconds:g} s; see to the server or "
                    "the network, or raise data.retry_seconds. ckpt_path=last continues from the last checkpoint."
                ) from error
        retries.add()
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(2 * pause, _LONGEST_PAUSE)


def reason_of(error: BaseException) -> str:
    """An error of some file system in a few words, without the address it may repeat with its password."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status}"
    if isinstance(error, FileNotFoundError):
        return "not found"
    said = re.sub(r"\S+://\S+", "…", " ".join(str(error).split()))[:150]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _not_installed(url: str, error: ImportError) -> str:
    scheme = urlsplit(url).scheme
    extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(scheme)
    hint = f"install interloom[{extra}]" if extra else f"install what fsspec needs for {scheme}://"
    return f"{masked(url)} cannot be read here ({' '.join(str(error).split())}); {hint}."


def open_address(url: str) -> tuple[Any, str]:
    """The file system of an address, and what the address is called there.

    Raises:
        AddressError: no such kind of address.
    """
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme in {"http", "https"}:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        options["client_kwargs"] = {"timeout": timeout}
    elif scheme in {"s3", "s3a"}:
        # It would try again itself, uncounted.
        times = {"connect_timeout": _SILENCE, "read_timeout": _SILENCE, "retries": {"max_attempts": 1}}
        options["config_kwargs"] = times
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise AddressError(_not_installed(url, error)) from error
    except ValueError as error:
        raise AddressError(f"{masked(url)} is no address that fsspec reads ({error}).") from error


def read_range(url: str, start: int, stop: int, seconds: float = RETRY_SECONDS) -> bytes:
    """Bytes ``start:stop`` of what is there.

    Raises:
        OutsideFault: they do not come.
    """

    def call() -> bytes:
        filesystem, path = open_address(url)
        data = filesystem.cat_file(path, start=start, end=stop)
        if len(data) > stop - start:  # a server without ranges sends all
            data = data[start:stop]
        if len(data) < stop - start:
            raise OSError(f"{len(data)} of {stop - start} bytes came")
        return data

    return persistently(call, url, seconds)


def read_whole(url: str, seconds: float = RETRY_SECONDS) -> bytes | None:
    """All that is there; None where the server says that nothing is.

    Raises:
        OutsideFault: it does not come.
    """

    def call() -> bytes | None:
        filesystem, path = open_address(url)
        try:
            return filesystem.cat_file(path)
        except FileNotFoundError:
            return None

    return persistently(call, url, seconds)


def names_in(url: str, seconds: float = RETRY_SECONDS) -> list[str]:
    """The names of the files in a folder behind an address, or of those that fit a pattern with ``*``, as paths."""

    def call() -> list[str]:
        filesystem, path = open_address(url)
        filesystem.invalidate_cache()
        found = filesystem.glob(path) if "*" in url else filesystem.ls(path, detail=False)
        return [str(name) for name in found]

    return persistently(call, url, seconds)


def check_there(url: str, size: int, seconds: float = RETRY_SECONDS) -> None:
    """See that a file of at least ``size`` bytes is there, by reading its last.

    Raises:
        FileNotFoundError: the server says that there is none.
        ValueError: it is shorter.
        OutsideFault: the server cannot be asked.
    """

    def call() -> str | None:
        filesystem, path = open_address(url)
        try:
            if filesystem.cat_file(path, start=size - 1, end=size):
                return None
        except FileNotFoundError:
            return "gone"
        except Exception as error:
            if getattr(error, "status", None) != 416 and "InvalidRange" not in repr(error.__cause__ or error):
                raise
        return "short"

    found = persistently(call, url, seconds)
    if found == "gone":
        raise FileNotFoundError(f"no shard at {masked(url)}")
    if found == "short":
        raise ValueError(
            f"{masked(url)} is shorter than the {size} bytes of its index: truncated, or replaced"
        )


def side_by_side(call: Callable[[Any], Result], values: Sequence[Any]) -> list[Result]:
    """Results of a call that waits for a server, for many values together."""
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="remote") as pool:
        futures = [pool.submit(call, value) for value in values]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def cached_index(url: str, sha256: str | None = None, seconds: float = RETRY_SECONDS) -> str:
    """The path of a local copy of an index, seen to be the one at the address.

    Args:
        sha256: of the index where a manifest lists it; then a copy needs no request.

    Raises:
        FileNotFoundError: the server says that there is none.
        ValueError: it is another than the manifest lists, or the cache cannot be written.
        OutsideFault: the server cannot be asked.
    """
    name = sha256 or hashlib.sha256(masked(url).encode()).hexdigest()
    path = cache_folder() / f"{name}.idx"
    if path.is_file() and (file_sha256(path) == sha256 if sha256 else _same_header(path, url, seconds)):
        return str(path)
    data = read_whole(url, seconds)
    if data is None:
        raise FileNotFoundError(f"no index at {masked(url)}")
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(
            f"{masked(url)} is not the index that the manifest beside it lists; bring both to the address together"
        )
    with writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, sync=False)
    return str(path)


def cache_folder() -> Path:
    """Where copies of indexes lie."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "interloom", "indexes")


def _same_header(path: Path, url: str, seconds: float) -> bool:
    """Whether a copy begins as the file at the address does: length of the header, then the header."""
    with open(path, "rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > _LONGEST_HEADER:
            return False
        begin += file.read(length)

    def call() -> bytes | None:
        filesystem, place = open_address(url)
        try:
            return filesystem.cat_file(place, start=0, end=len(begin))
        except FileNotFoundError:
            return None

    found = persistently(call, url, seconds)
    return found is not None and found[: len(begin)] == begin
