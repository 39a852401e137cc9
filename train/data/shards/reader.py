"""Reading samples of indexed shards by offset: ``pread`` on local files, range reads elsewhere.

    shards = ShardSet.open("data/cc3m")            # folder, glob, tar, brace pattern, URL, or a list of them
    len(shards), shards.tokens, shards.shards[0]   # sums come from index headers: nothing else is read
    reader = ShardReader(shards)
    record = reader.read(17)                       # Record(key, shard, members={"jpg": memoryview, …})

One sample is one read (its members lie side by side), checked against the CRC of the index. Whatever is wrong
with a sample is a :class:`~.report.BadSample` with a reason; whatever is wrong with a shard as a whole (no
index, truncated, gone) is in ``shards.report`` and in the log.

Both objects are cheap to send to worker processes and safe to use after a fork.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..names import is_image
from ..report import BadSample, SkipReport, printable
from ..text import decode_text
from .find import ShardInfo, distinct_names, expand, shard_infos
from .index import ALLOWED_EXTENSIONS, Member, ShardIndex
from .remote import RETRY_SECONDS, is_local, masked, read_range

log = logging.getLogger(__name__)
_OPEN_FILES = 128
_MAX_SAMPLE = 1 << 30  # bytes from the first member of a sample to its last
_OPEN_INDEXES = 256
_REMOTE_READS = 16


@dataclass(slots=True)
class Record:
    """One sample as stored: ``members`` maps extension to a view of its bytes.

    ``nouns`` are those that the index holds for it, None where it holds none.
    """

    key: str
    shard: str
    sample: int
    members: dict[str, memoryview]
    nouns: list[str] | None = None

    @property
    def name(self) -> str:
        """``shard/key``, as reports show it."""
        return f"{self.shard}/{printable(self.key)}"

    def text(self, extension: str) -> str | None:
        """A text member decoded, None if there is none.

        Raises:
            BadSample: neither UTF-8 nor UTF-16.
        """
        data = self.members.get(extension)
        if data is None:
            return None
        try:
            return decode_text(bytes(data))
        except UnicodeDecodeError as error:
            raise BadSample("text not UTF-8", self.name, str(error)) from None

    def json(self, extension: str = "json") -> Any:
        """A JSON member parsed, None if there is none.

        Raises:
            BadSample: not JSON.
        """
        text = self.text(extension)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadSample("broken JSON", self.name, str(error)[:100]) from None


def image_of(record: Record) -> memoryview:
    """The encoded picture of a pair; ``mask.png`` is none.

    Raises:
        BadSample: it has no image.
    """
    for extension, data in record.members.items():
        if is_image(extension):
            return data
    raise BadSample("no image", record.name)


class ShardSet:
    """An ordered set of indexed shards seen as one sequence of samples.

    Build it with :meth:`open`. ``starts`` [S + 1] are the cumulated sample counts.
    """

    def __init__(
        self, shards: Sequence[ShardInfo], report: SkipReport | None = None, source: str = ""
    ) -> None:
        self.shards = tuple(shards)
        self.report = report if report is not None else SkipReport()
        self.source = source
        self.starts = np.concatenate([[0], np.cumsum([s.samples for s in self.shards])]).astype(np.int64)
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.images = sum(shard.images for shard in self.shards)
        self.retry_seconds = RETRY_SECONDS
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def open(
        cls,
        sources: str | Path | Iterable[str | Path],
        *,
        kind: str | None = None,
        max_skip_rate: float = 0.01,
        retry_seconds: float = RETRY_SECONDS,
    ) -> ShardSet:
        """Find shards and read their index headers.

        Args:
            sources: folders, globs, brace patterns (``{000..127}.tar``) or tars; local paths or URLs that
                fsspec knows. Several are joined in the given order.
            kind: ``pairs`` or ``documents``; other shards are refused. None takes any.
            max_skip_rate: share of samples that may be lost to shards without a usable index.
            retry_seconds: how long a server is asked again before the run ends, now and while shards are read.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: shards of another kind, too many without an index, or a remote one that its manifest
                lists is not there.
            OutsideFault: a server does not answer.
        """
        listed = [sources] if isinstance(sources, str | Path) else list(sources)
        report, infos, lost, unknown = SkipReport(), [], 0, 0
        if not 0 <= retry_seconds < float("inf"):
            raise ValueError(f"data.retry_seconds={retry_seconds} given, expected seconds from 0")
        found = [one for source in listed for one in expand(str(source), report, retry_seconds)]
        for (url, expected, _), info in zip(found, shard_infos(found, retry_seconds), strict=True):
            name = url.rpartition("/")[2]
            if isinstance(info, Exception):
                error = info
                gone = "no shard at" in str(error)
                missing = "missing shard" if gone else "missing index"
                reason = missing if isinstance(error, FileNotFoundError) else "unreadable index"
                report.add(reason, name, "" if reason == missing else str(error)[:200])
                log.warning("%s left out: %s (%s)", masked(url), reason, error)
                lost, unknown = lost + (expected or 0), unknown + (expected is None)
                continue
            size = os.path.getsize(url) if is_local(url) else info.bytes
            if size != info.bytes:
                reason = "truncated shard" if size < info.bytes else "shard longer than its index says"
                log.warning("%s: %s (%d bytes, index says %d)", url, reason, size, info.bytes)
            if kind is not None and info.kind != kind:
                raise ValueError(
                    f"{url} holds {info.kind}, expected {kind}; point the config at shards of {kind}"
                )
            infos.append(info)
        described = ", ".join(masked(str(source)) for source in listed)
        if not infos:
            reasons = "; ".join(report.lines()) or "no .tar there"
            raise FileNotFoundError(
                f"no usable shard in {described} ({reasons}); build shards with `interloom data pairs SOURCE "
                "OUT` or index existing tars with `interloom data pairs DIR DIR --index-only`"
            )
        kept = sum(info.samples for info in infos)
        lost += round(unknown * kept / len(infos))
        report.seen = kept + lost
        if lost > max_skip_rate * (kept + lost):
            raise ValueError(
                f"{described}: about {lost} of {kept + lost} samples lie in shards that cannot be used, more "
                f"than the allowed share of {max_skip_rate:g} ({'; '.join(report.lines())}); index them with "
                "`interloom data pairs DIR DIR --index-only`, or raise max_skip_rate"
            )
        opened = cls(distinct_names(infos), report, described)
        opened.retry_seconds = retry_seconds
        return opened

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indexes": OrderedDict()}

    def describe(self) -> str:
        """Where the shards came from, for messages."""
        return self.source or f"{len(self.shards)} shards"

    def digests(self) -> dict[str, str]:
        """Shard name to digests of its bytes and of its index columns, in order: part of a fingerprint."""
        return {s.name: f"{s.samples}:{s.sha256[:16]}:{s.columns_sha256[:16]}" for s in self.shards}

    def order(self) -> str:
        """Digest of the order of the shards: sample ids depend on it."""
        return hashlib.sha256("\n".join(shard.name for shard in self.shards).encode()).hexdigest()[:16]

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard number [n], sample number inside it [n]) of the sample ids [n]."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise ValueError(f"sample id {ids.min()}..{ids.max()} given, expected 0..{len(self) - 1}")
        shard = np.searchsorted(self.starts, ids, side="right") - 1
        return shard, ids - self.starts[shard]

    def index(self, shard: int) -> ShardIndex:
        """The index of one shard; the most recently used stay open."""
        if shard in self._indexes:
            self._indexes.move_to_end(shard)
        else:
            self._indexes[shard] = ShardIndex(self.shards[shard].index)
            if len(self._indexes) > _OPEN_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``start:stop`` (sample ids) of a per-sample column such as ``tokens``, across shards."""
        parts = []
        first, last = self.locate(np.array([start, stop - 1]))[0] if stop > start else (0, -1)
        for shard in range(int(first), int(last) + 1):
            low, high = int(self.starts[shard]), int(self.starts[shard + 1])
            parts.append(self.index(shard).column_slice(name, max(start, low) - low, min(stop, high) - low))
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def _open_regular(path: str) -> int:
    """A descriptor of a regular file; a pipe would be waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is no regular file")
    return handle


def _sound(data: memoryview, start: int, members: Sequence[Member]) -> bool:
    """Whether every member in the bytes of a shard from ``start`` on has its checksum."""
    return all(zlib.crc32(data[m.offset - start :][: m.length]) == m.crc32 for m in members)


class ShardReader:
    """Reads samples of a :class:`ShardSet` by id.

    Args:
        shards: what to read.
        allowed: last suffixes of members that are returned; others stay unread.
        check: compare every member with the CRC of the index (about 1 GB/s).
    """

    def __init__(
        self, shards: ShardSet, *, allowed: frozenset[str] = ALLOWED_EXTENSIONS, check: bool = True
    ) -> None:
        self.shards, self.allowed, self.check = shards, allowed, check
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_pool": None}

    def name(self, sample: int) -> str:
        """``shard/key`` of a sample id."""
        shard, row = self.shards.locate(np.array([sample]))
        number = int(shard[0])
        return f"{self.shards.shards[number].name}/{printable(self.shards.index(number).key(int(row[0])))}"

    def read(self, sample: int, bad: list[BadSample] | None = None) -> Record:
        """Members of one sample in one read.

        Args:
            sample: id in the set.
            bad: where given, members that differ from the index are left out and named here, and the rest
                of the sample is returned; else they are raised.

        Raises:
            BadSample: gone, truncated, or not the bytes that were indexed.
            OutsideFault: a server does not give it for as long as the set was opened with.
        """
        shard, row = (int(x[0]) for x in self.shards.locate(np.array([sample])))
        info = self.shards.shards[shard]
        try:
            index = self.shards.index(shard)
            key, members, nouns = index.key(row), index.members(row), index.nouns(row)
        except (OSError, ValueError, IndexError) as error:
            raise BadSample("unreadable index", f"{info.name} sample {row}", str(error)[:200]) from None
        name = f"{info.name}/{printable(key)}"
        members = [m for m in members if m.extension.rpartition(".")[2] in self.allowed]
        if not members:
            raise BadSample("no readable member", name)
        start = min(m.offset for m in members)
        stop = max(m.offset + m.length for m in members)
        if stop - start > _MAX_SAMPLE:
            raise BadSample("sample too large", name, f"its members span {stop - start} bytes")
        try:
            data = memoryview(self._fetch(info.url, start, stop))
            if self.check and not is_local(info.url) and not _sound(data, start, members):
                data = memoryview(self._fetch(info.url, start, stop))  # damaged on its way, perhaps
        except FileNotFoundError:
            raise BadSample("missing shard", name) from None
        except OSError as error:
            raise BadSample("read error", name, str(error)[:200]) from None
        if len(data) < stop - start:
            raise BadSample("truncated shard", name, f"{info.name} ends before byte {stop}")
        found: dict[str, memoryview] = {}
        for member in members:
            view = data[member.offset - start : member.offset - start + member.length]
            if self.check and zlib.crc32(view) != member.crc32:
                damage = BadSample("checksum differs", name, f".{member.extension}")
                if bad is None:
                    raise damage
                bad.append(damage)
                continue
            found[member.extension] = view
        return Record(key, info.name, sample, found, nouns)

    def read_many(self, samples: Sequence[int]) -> list[Record | BadSample]:
        """Several samples, each a record or what is wrong with it; remote ones are read side by side."""
        if all(is_local(shard.url) for shard in self.shards.shards[:1]) or len(samples) < 2:
            return [self._attempt(sample) for sample in samples]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REMOTE_READS, thread_name_prefix="shard-read")
        return list(self._pool.map(self._attempt, samples))

    def _attempt(self, sample: int) -> Record | BadSample:
        try:
            return self.read(sample)
        except BadSample as bad:
            return bad

    def _fetch(self, url: str, start: int, stop: int) -> bytes:
        if not is_local(url):
            return read_range(url, start, stop, self.shards.retry_seconds)
        # After a fork descriptors are shared with the parent, which pread, having no position, does not mind.
        handle = self._files.get(url)
        if handle is None:
            handle = self._files[url] = _open_regular(url)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(url)
        data = os.pread(handle, stop - start, start)
        while 0 < len(data) < stop - start:
            more = os.pread(handle, stop - start - len(data), start + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        """Close the open files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()
