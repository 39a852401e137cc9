"""The image fetcher against a local server that does what the open web does."""

import asyncio
import io
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from interloom.train.data.addresses import Guard, PrivateAddress
from interloom.train.data.download import Fetcher, FetchPolicy, is_public, opted_out
from PIL import Image


def picture(kind="JPEG", size=(40, 30), colour=(200, 30, 60)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def bomb(width=60_000, height=60_000):
    """A PNG of a few bytes whose header promises 3.6 gigapixels."""

    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body=b"", status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server = self.server
        path = self.path
        with server.lock:
            server.hits[path] = server.hits.get(path, 0) + 1
            hit = server.hits[path]
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            if path.startswith("/ok"):
                time.sleep(0.02)
                self.reply(picture(), Content_Type="text/plain")  # a wrong type must not matter
            elif path == "/png":
                self.reply(picture("PNG"))
            elif path == "/html.jpg":
                self.reply(b"<html><body>sold out</body></html>", Content_Type="image/jpeg")
            elif path == "/bomb.png":
                self.reply(bomb())
            elif path == "/missing":
                self.reply(b"no", 404)
            elif path == "/loop":
                self.reply(status=302, Location="/loop")
            elif path == "/inward":
                self.reply(status=302, Location=f"http://localhost:{server.server_port}/ok")
            elif path == "/metadata":
                self.reply(status=301, Location="http://169.254.169.254/latest/meta-data")
            elif path == "/file":
                self.reply(status=302, Location="file:///etc/passwd")
            elif path == "/moved":
                self.reply(status=302, Location="/ok-moved")
            elif path == "/opt-out":
                self.reply(picture(), X_Robots_Tag="noai, nofollow")
            elif path == "/huge":
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                for _ in range(64):
                    self.wfile.write(b"\xff" * 65_536)
            elif path == "/stall":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(picture()[:20])
                self.wfile.flush()
                server.released.wait(5)
            elif path == "/drip":
                self.send_response(200)
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"\xff")
                    self.wfile.flush()
                    if server.released.wait(0.1):
                        break
            elif path == "/truncated":
                body = picture()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body) * 2))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True
            elif path == "/cut.jpg":  # an honest length, but only half a picture
                self.reply(picture(size=(400, 300))[:1500])
            elif path == "/recovers":
                self.reply(b"", 503) if hit < 3 else self.reply(picture())
            elif path == "/recovers-later":
                self.reply(b"", 404) if hit < 2 else self.reply(picture())
            elif path == "/gzip":
                self.reply(zlib.compress(picture()), Content_Encoding="deflate")
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.active -= 1


@pytest.fixture
def server():
    instance = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.daemon_threads = True
    instance.lock, instance.hits, instance.active, instance.most_active = threading.Lock(), {}, 0, 0
    instance.released = threading.Event()
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    instance.base = f"http://127.0.0.1:{instance.server_port}"
    yield instance
    instance.released.set()
    instance.shutdown()
    instance.server_close()


def fetcher(server, cache=None, **limits):
    defaults = {"stall": 0.4, "deadline": 4.0, "retries": 2, "backoff": 0.02, "max_bytes": 2**20}
    allow = frozenset({f"127.0.0.1:{server.server_port}"})
    return Fetcher(FetchPolicy(**{**defaults, "allow_hosts": allow, **limits}), cache)


@pytest.mark.parametrize(
    ("path", "reason", "hits"),
    [
        ("/html.jpg", "not an image", 1),
        ("/bomb.png", "too many pixels", 1),
        ("/missing", "http 404", 1),
        ("/loop", "too many redirects", 6),
        ("/inward", "private address", 1),
        ("/metadata", "private address", 1),
        ("/file", "not http(s)", 1),
        ("/opt-out", "opted out (X-Robots-Tag)", 1),
        ("/huge", "too many bytes", 1),
        ("/stall", "stalled", 3),
        ("/truncated", "truncated", 3),
        ("/cut.jpg", "truncated or broken image", 3),
        ("/gzip", "compressed body", 1),
    ],
)
def test_each_failure_has_its_reason(server, path, reason, hits):
    (item,) = fetcher(server).fetch([server.base + path])
    assert (item.data, item.reason) == (None, reason)
    assert server.hits[path] == hits


def test_a_drip_ends_at_the_deadline(server):
    started = time.monotonic()
    (item,) = fetcher(server, deadline=1.0).fetch([server.base + "/drip"])
    assert item.reason == "deadline"
    assert time.monotonic() - started < 4


def test_good_pictures_arrive_in_order_and_are_cached(server, tmp_path):
    addresses = [server.base + p for p in ("/png", "/ok", "/missing", "/moved", "/ok")]
    found = list(fetcher(server, tmp_path).fetch(addresses))
    assert [f.url for f in found] == addresses
    assert [f.extension for f in found] == ["png", "jpg", None, "jpg", "jpg"]
    assert (found[1].width, found[1].height, found[1].data) == (40, 30, picture())
    assert server.hits["/ok"] == 1
    again = list(fetcher(server, tmp_path).fetch(addresses))
    assert [f.data for f in again] == [f.data for f in found]
    assert [f.cached for f in again] == [True, True, False, True, True]
    assert server.hits["/ok"] == 1


def test_a_damaged_cache_entry_is_fetched_again(server, tmp_path):
    address = server.base + "/ok"
    (first,) = fetcher(server, tmp_path).fetch([address])
    (stored,) = (p for p in (tmp_path / "objects").rglob("*") if p.is_file())
    stored.write_bytes(b"damaged")
    (second,) = fetcher(server, tmp_path).fetch([address])
    assert second.data == first.data
    assert not second.cached


def test_a_server_that_recovers(server, tmp_path):
    (item,) = fetcher(server).fetch([server.base + "/recovers"])
    assert (item.reason, item.attempts) == (None, 3)
    # a failure is never cached: the next run asks again
    (item,) = fetcher(server, tmp_path).fetch([server.base + "/recovers-later"])
    assert item.reason == "http 404"
    (item,) = fetcher(server, tmp_path).fetch([server.base + "/recovers-later"])
    assert item.data is not None


def test_per_host_concurrency_is_bounded(server):
    found = list(
        fetcher(server, per_host=2, concurrency=16).fetch(f"{server.base}/ok?{i}" for i in range(12))
    )
    assert all(f.data for f in found)
    assert server.most_active <= 2


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("ftp://example.org/a.jpg", "not http(s)"),
        ("file:///etc/passwd", "not http(s)"),
        ("http://127.0.0.1:1/a.jpg", "private address"),
        ("http://[::1]/a.jpg", "private address"),
        ("http://[::ffff:10.0.0.1]/a.jpg", "private address"),
        ("http://169.254.169.254/latest", "private address"),
        ("http://localhost:1/a.jpg", "private address"),
        ("http://user:secret@example.org/a.jpg", "bad address"),
        ("http:///a.jpg", "bad address"),
        ("http://[bad", "bad address"),
        ("", "not http(s)"),
    ],
)
def test_addresses_that_are_never_asked(address, reason):
    (item,) = Fetcher(FetchPolicy(retries=0, deadline=3)).fetch([address])
    assert item.reason == reason


@pytest.mark.parametrize(
    ("address", "public"),
    [("8.8.8.8", True), ("2001:4860:4860::8888", True), ("10.1.2.3", False), ("172.16.0.1", False),
     ("192.168.1.1", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
     ("fe80::1%eth0", False),
     ("fd00::1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
     ("64:ff9b::808:808", True), ("2002:808:808::1", True), ("::ffff:8.8.8.8", True), ("2600::", True),
     ("fec0::1", False), ("64:ff9b:1::7f00:1", False), ("::ffff:0:127.0.0.1", False), ("::127.0.0.1", False),
     ("::ffff:127.0.0.1", False), ("5f00::1", False), ("3fff::1", False), ("::", False), ("ff02::1", False),
     ("2001:0:7f00:1::", False), ("2001:db8::1", False), ("100::1", False), ("4000::1", False),
     ("192.0.0.1", False), ("198.18.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False)],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host",
    ["１２７.０.０.１", "127。0。0。1", "①②⑦.⓪.⓪.①", "2130706433", "0x7f.1", "0177.0.0.1", "127.1",
     "[::ffff:0:127.0.0.1]", "[::127.0.0.1]", "[fec0::1]", "127.0.0.1.", "LOCALHOST", "[::ffff:127.0.0.1]",
     "%31%32%37.0.0.1"],
)  # fmt: skip
def test_no_way_of_writing_loopback_is_connected_to(server, host):
    """Not one request reaches the server here, sent there or asked for at first."""
    port = server.server_port
    (direct,) = Fetcher(FetchPolicy(retries=0, deadline=5)).fetch([f"http://{host}:{port}/ok"])
    assert direct.reason in {"private address", "bad address", "connection failed"}
    assert not server.hits


def test_a_socket_is_judged_whatever_found_its_address():
    guard = Guard(lambda host, port: host == "10.0.0.7")
    loopback = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))
    with pytest.raises(PrivateAddress):
        guard.socket(loopback)
    allowed = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))
    with pytest.raises(PrivateAddress):
        guard.socket(allowed)
    assert guard.exempt("10.0.0.7", 80)
    guard.socket(allowed).close()


def test_opt_out_headers():
    assert opted_out(["noai"], "interloom")
    assert opted_out(["max-snippet:20, NoImageAI"], "interloom")
    assert opted_out(["interloom: noindex"], "interloom (+x)")
    assert not opted_out(["googlebot: noindex"], "interloom")
    assert not opted_out(["nofollow", "all"], "interloom")
    assert not opted_out([], "interloom")


def test_names_are_resolved_and_judged_at_every_hop(monkeypatch):
    """A name that answers with one public and one private address is refused: either could be chosen."""

    async def resolve(self, host, port, **kwargs):
        return [(2, 1, 6, "", ("93.184.215.14", port)), (2, 1, 6, "", ("10.0.0.7", port))]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", resolve)
    (item,) = Fetcher(FetchPolicy(retries=0, deadline=3)).fetch(["http://rebinding.example/a.jpg"])
    assert item.reason == "private address"
