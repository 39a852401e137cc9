"""A server of a folder on loopback that fails on purpose, and comes back."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("500", "503", "403", "404", "reset", "truncated", "short", "damaged")


class FaultyServer:
    """Serves ``root`` with ranges; the next ``failures`` requests for names that end in ``suffix`` meet ``fault``.

    Faults are a status, ``reset`` (the connection is torn down), ``truncated`` (less than was announced), ``short``
    (less, and announced so), ``damaged`` (other bytes).
    """

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = root
        self.fault, self.failures, self.suffix = "", 0, ".tar"
        self.ranges = True
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = port
        self.start()

    def start(self) -> None:
        """Listen, at the port from before where there was one."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fail(self, fault: str, failures: int = 1 << 60, suffix: str = ".tar") -> None:
        self.fault, self.failures, self.suffix = fault, failures, suffix

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _strikes(self, path: str) -> str:
        with self._lock:
            self.requests[path.rpartition("/")[2]] += 1
            if self.failures <= 0 or not path.endswith(self.suffix):
                return ""
            self.failures -= 1
            return self.fault

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        fault = self._strikes(path)
        if fault.isdigit():
            handler.send_response(int(fault))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        file = self.root / path.lstrip("/")
        if not file.is_file():
            handler.send_response(404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data = file.read_bytes()
        size, start, stop, status = len(data), 0, len(data), 200
        given = handler.headers.get("Range")
        if given and self.ranges:
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(size, int(last) + 1 if last else size), 206
            if start >= size:
                handler.send_response(416)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
        data = data[start:stop]
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "damaged":
            data = bytes(byte ^ 0x5A for byte in data)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "truncated":
            handler.close_connection = True
