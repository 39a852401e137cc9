"""How a case is collected, and what is done with what it draws."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from interloom.train.cli import _guard, main
from PIL import Image

SECRET = "a-secret-of-this-machine"
Call = Callable[[], int]


class Case(NamedTuple):
    """What is done with the folder, how it must end, and a word of what is said."""

    call: Call
    code: int
    says: str


DRAWN: dict[str, Callable[[Path], Case]] = {}
SAMPLE: set[str] = set()


def case(*, sample: bool = False) -> Any:
    """Collect a function that draws a case."""

    def add(draw: Callable[[Path], Case]) -> Callable[[Path], Case]:
        name = draw.__name__.removeprefix("draw_")
        DRAWN[name] = draw
        if sample:
            SAMPLE.add(name)
        return draw

    return add


def command(*arguments: object) -> Call:
    return lambda: main([str(argument) for argument in arguments])


def guarded(work: Callable[[], object]) -> Call:
    """What a command does inside, under the command's own way of ending."""

    def call() -> int:
        work()
        return 0

    return lambda: _guard(call)


def picture(path: Path, size: tuple[int, int] = (24, 24)) -> Path:
    Image.new("RGB", size, (200, 30, 60)).save(path)
    return path


def png(width: int, height: int, padding: int = 0) -> bytes:
    """A PNG of one black row, whatever its header says, with ``padding`` bytes that no reader uses."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width) * (height if width * height < 10**6 else 1), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    if padding:
        parts.insert(1, chunk(b"juNk", bytes(padding)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def serve(host: str, body: bytes) -> int:
    """The port of a server that answers everything with ``body``; it ends with the tests."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((host, 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def write_a_huge_cell(path: Path, columns: tuple[str, ...], which: str) -> None:
    """A table of kilobytes; a process of its own makes it, which takes gigabytes for a moment."""
    lists = "texts" in columns
    code = f"""
import numpy, pyarrow, pyarrow.parquet
kept = dict(compression="zstd", use_dictionary=False, write_statistics=False)
size = 2**31 - 64
ends = pyarrow.py_buffer(numpy.array([0, size], numpy.int32))
huge = pyarrow.StringArray.from_buffers(1, ends, pyarrow.py_buffer(numpy.zeros(size, numpy.uint8)))
cells = {{name: huge if name == {which!r} else pyarrow.array(["a.png"]) for name in {columns!r}}}
if {lists}:
    cells = {{n: pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), c) for n, c in cells.items()}}
pyarrow.parquet.write_table(pyarrow.table(cells), {str(path)!r}, **kept)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert path.stat().st_size < 100_000
