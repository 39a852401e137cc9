"""Files of JSON records: lines or one array, plain or compressed, read a record at a time.

A file is one record a line, or one JSON array of records (``.json``), or a single object. Each record is found by its
first byte, so that workers start in the middle; of a compressed file that is a place in what it unpacks to. A record
is at most :data:`MAX_RECORD` bytes, for JSON takes twenty times its size in memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..report import BadSample

MAX_RECORD = 64 * 2**20
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_BLOCK = 1 << 20
# What a compressed file may unpack to, beyond which it is no text but a bomb.
_UNPACKED, _RATIO = 4 * 2**20, 50
_BLANK = b" \t\r\n\xef\xbb\xbf"


def file_kind(path: Path) -> str:
    """``jsonl``, ``json`` or ``parquet`` by a name's suffixes; "" for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        known = SUFFIXES.get(suffixes[0]) if len(suffixes) == 2 else None
        # A zip that does not say so may hold anything; mmc4's hold one file of lines.
        kind = known or ("" if suffixes[-1] == ".zip" else "jsonl")
        return "" if kind == "parquet" else kind
    return SUFFIXES.get(suffixes[-1], "") if suffixes else ""


def file_stem(name: str) -> str:
    """A name without the suffixes that say how the file is written: what keys begin with."""
    for known in (*COMPRESSED, *SUFFIXES):
        if name.lower().endswith(known):
            name = name[: -len(known)]
    return name


def record_ranges(path: Path, kind: str, count: int) -> Iterator[tuple[int, int, int]]:
    """(first record, last record + 1, offset of the first) of every ``count`` records of a file.

    Raises:
        BadSample: the file is damaged; what came before it was given out.
    """
    start = offset = number = 0
    try:
        for number, (position, _) in enumerate(_spans(path, kind, keep=False), 1):
            if number - start == count + 1:
                yield start, number - 1, offset
                start, offset = number - 1, position
            elif number == 1:
                offset = position
    except BadSample:
        if number > start:
            yield start, number, offset
        raise
    if number > start:
        yield start, number, offset


def read_records(path: Path, kind: str, offset: int, count: int) -> Iterator[bytes | None]:
    """``count`` records from ``offset`` on, as they are written; None for one of more than :data:`MAX_RECORD`."""
    found = _spans(path, kind, keep=True, offset=offset)
    for _ in range(count):
        entry = next(found, None)
        if entry is None:
            return
        yield entry[1]


def _spans(path: Path, kind: str, *, keep: bool, offset: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """(place, bytes) of every record; blank lines are none."""
    try:
        with _open(path) as stream:
            if kind == "json" and _is_lines(path):
                kind = "jsonl"
            _skip(stream, offset)
            yield from (_lines if kind == "jsonl" else _elements)(stream, offset, keep)
    except Bomb:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise BadSample("file damaged", str(path), f"{type(error).__name__}: {error}"[:120]) from None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        stream: Any = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]
    elif suffix == ".zip":
        stream = _only_member(path)
    else:
        stream = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")
    wide = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if suffix in COMPRESSED:
        stream = _Bounded(stream, str(path), max(_UNPACKED, _RATIO * path.stat().st_size))
    return _Recoded(stream) if wide else stream  # type: ignore[return-value]


def _only_member(path: Path) -> IO[bytes]:
    """The one file that an archive holds.

    Raises:
        ValueError: it holds none, several or an encrypted one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise ValueError(f"{len(members)} files in a zip, expected one")
            return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from None


class Bomb(BadSample):
    """A compressed file of which nothing is worth reading."""


class _Bounded:
    """A stream that unpacks to no more than a number of bytes."""

    def __init__(self, stream: Any, name: str, limit: int) -> None:
        self._stream, self._name, self._left = stream, name, limit

    def read(self, size: int) -> bytes:
        # Of a file that was cut short this gives what stands before the cut.
        data = self._stream.read1(size)
        self._left -= len(data)
        if self._left < 0:
            raise Bomb(f"unpacks to more than {_RATIO} times its size", self._name)
        return data

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class _Recoded:
    """A stream of UTF-16, as some shells of Windows write JSON, read as UTF-8."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-16")()
        self._ready = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            data = self._stream.read(size)
            self._ready = self._decoder.decode(data, not data).encode("utf-8")
            if not data:
                break
        given, self._ready = self._ready[:size], self._ready[size:]
        return given

    def __enter__(self) -> _Recoded:
        return self

    def __exit__(self, *fault: object) -> None:
        self._stream.__exit__(*fault)


def _skip(stream: IO[bytes], offset: int) -> None:
    if hasattr(stream, "seek"):
        stream.seek(offset)
        return
    while offset:
        block = stream.read(min(offset, _BLOCK))
        if not block:
            return
        offset -= len(block)


def _is_lines(path: Path) -> bool:
    """Whether a ``.json`` file is one object a line: it begins with an object that ends where its line does."""
    depth, text = 0, False
    with _open(path) as stream:
        head = stream.read(_BLOCK).lstrip(_BLANK)
    if not head.startswith(b"{"):
        return False
    line = head.split(b"\n", 1)[0]
    for token in re.finditer(rb'\\.|"|[\[\]{}]', line):
        mark = token.group()
        if mark == b'"':
            text = not text
        elif not text and len(mark) == 1:
            depth += 1 if mark in b"[{" else -1
    # Of a line longer than what was looked at nothing is known, and pretty-printed files have none.
    return depth == 0 or len(line) == len(head)


def _lines(stream: IO[bytes], offset: int, keep: bool) -> Iterator[tuple[int, bytes | None]]:
    record, place = _Piecewise(keep), offset
    while block := stream.read(_BLOCK):
        begin = 0
        while (end := block.find(b"\n", begin)) >= 0:
            record.add(block[begin:end])
            if not record.blank:
                yield place, record.content()
            place += record.length + 1
            begin = end + 1
            record.start()
        record.add(block[begin:])
    if not record.blank:
        yield place, record.content()


# Within a string all up to its end or to what stands at the end of a block; else what opens, closes and parts.
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_MARK = re.compile(rb'["\[\]{},]')


class _Piecewise:
    """A record in the making, of pieces: bytes up to a limit, and whether anything stands in it at all."""

    def __init__(self, keep: bool) -> None:
        # What is not kept is only told apart from nothing.
        self._limit = MAX_RECORD if keep else 0
        self.start()

    def start(self) -> None:
        self._held: list[bytes] = []
        self.length, self.blank = 0, True

    def add(self, piece: bytes) -> None:
        self.blank = self.blank and not piece.strip(_BLANK)
        self.length += len(piece)
        if self.length <= self._limit:
            self._held.append(piece)
        else:
            self._held.clear()

    def content(self) -> bytes | None:
        return b"".join(self._held) if self.length <= self._limit else None


def _elements(stream: IO[bytes], offset: int, keep: bool) -> Iterator[tuple[int, bytes | None]]:
    """Elements of an array whose opening bracket stands before ``offset``, or at 0; or one object."""
    depth, text, alone = 1 if offset else 0, False, False
    record = _Piecewise(keep)
    carry, place, base = b"", offset, offset
    while block := stream.read(_BLOCK):
        block, carry = carry + block, b""
        position = begin = 0
        while position < len(block):
            if text:
                position = _STRING.match(block, position).end()  # type: ignore[union-attr]
                if position == len(block):
                    break
                if block[position] == 0x5C:  # a backslash whose partner is in the next block
                    block, carry = block[:position], block[position:]
                    break
                text = False
                position += 1
                continue
            found = _MARK.search(block, position)
            if found is None:
                break
            mark, position = found.group(), found.end()
            if mark == b'"':
                text = True
            elif mark in (b"[", b"{"):
                if depth == 0 and mark == b"[":
                    begin, place = position, base + position
                    record.start()
                elif depth == 0:
                    alone, depth = True, 1
                depth += 1
            elif depth == 1 and not alone and mark in (b",", b"]"):
                record.add(block[begin : position - 1])
                if not record.blank:
                    yield place, record.content()
                begin, place = position, base + position
                record.start()
                if mark == b"]":
                    return
            elif mark in (b"]", b"}"):
                depth -= 1
                if depth < 1:
                    raise ValueError("brackets that do not match")
        record.add(block[begin:])
        base += len(block)
    if depth > 1 or text or not (alone or record.blank):
        raise ValueError("it ends within a record")
    if alone:
        yield place, record.content()
