"""Guarded image downloads: what the open web may and may not do to a training run.

OBELICS ships addresses, not pixels, so somebody has to ask the web for them. The web stalls, lies about
types, redirects into private networks and serves decompression bombs; every one of these ends here as a
counted reason, never as a hang, a crash or a request to a machine on the inside:

- only ``http`` and ``https``; each redirect hop is resolved anew, every address it resolves to must be
  public, and so must be the one that a socket is about to connect to, however it was found;
- bytes are counted while they stream in, the fetch has one deadline, retries are bounded and backed off;
- the type is sniffed from the content and the pixel count read from the header before decoding;
- ``X-Robots-Tag`` opt-outs (``noai``, ``noimageai``, ``noindex``, ``noimageindex``) are honoured.

Pictures that arrive are kept in a content-addressed cache; failures are not, so a server that recovers is
asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from ...models.pictures import FORMATS, MAX_PIXELS, PictureError, open_picture
from ..files import write_atomically
from .addresses import Guard, PrivateAddress, is_public
from .decode import Picture
from .report import BadSample

if TYPE_CHECKING:
    import aiohttp

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Worth asking again: the server is overloaded or a gateway hiccuped.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
# Bodies of more bytes that are read at once, and pictures that are decoded at once: what either takes is bounded.
_LARGE, _LARGE_AT_ONCE, _DECODED_AT_ONCE = 2 * 2**20, 8, 4


@dataclass(frozen=True)
class FetchPolicy:
    """Limits of one fetch.

    Attributes:
        max_bytes: largest body, in bytes.
        max_pixels: largest width × height, read from the header.
        deadline: seconds for everything: all hops, all retries, all waiting in between.
        stall: seconds without a byte before an attempt is given up.
        retries: further attempts after a transient failure.
        backoff: seconds before the first retry; doubled each time.
        max_redirects: hops followed.
        concurrency: fetches under way at once; ``per_host`` of them to one host.
        allow_hosts: ``host`` or ``host:port`` that may resolve to private addresses (tests, an own mirror).
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    deadline: float = 30.0
    stall: float = 10.0
    retries: int = 2
    backoff: float = 0.5
    max_redirects: int = 5
    concurrency: int = 64
    per_host: int = 4
    allow_hosts: frozenset[str] = frozenset()
    user_agent: str = "interloom (+image fetcher; honours X-Robots-Tag)"


@dataclass(frozen=True)
class Fetched:
    """One fetch: the picture's bytes, or the ``reason`` why there are none."""

    url: str
    data: bytes | None = field(default=None, repr=False)
    sha256: str | None = None
    extension: str | None = None
    width: int = 0
    height: int = 0
    reason: str | None = None
    attempts: int = 0
    cached: bool = False


class Refused(Exception):
    """A permanent failure; the message is the reason that reports count."""


class Transient(Exception):
    """A failure worth another attempt."""


def sniff(data: bytes, max_pixels: int) -> tuple[str, int, int]:
    """Return (extension, width, height) of an encoded picture, from its header alone.

    Raises:
        Refused: the content is no picture of a format that is read, or is larger than ``max_pixels``.
    """
    head = data[:512].lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{", b"<head")):
        raise Refused("not an image")
    try:
        image = open_picture(data, max_pixels=max_pixels)
    except PictureError as error:
        raise Refused(error.reason) from None
    return FORMATS[str(image.format)], *image.size


def check_decodes(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Decode once, so that a truncated picture is found while it can still be asked for again."""
    try:
        Picture(data, max_pixels=max_pixels).decode(32, 32)  # at little cost
    except BadSample:
        raise Transient("truncated or broken image") from None


def opted_out(header_values: Iterable[str], user_agent: str) -> bool:
    """Whether ``X-Robots-Tag`` values forbid the use, for everybody or for ``user_agent``."""
    name = user_agent.split()[0].lower() if user_agent else ""
    for value in header_values:
        addressed_to = "*"
        for directive in re.split(r"[,;]", value):
            # "googlebot: noindex, noai": a list may be addressed to one agent; "max-snippet: 20" is no agent.
            prefix, colon, rest = (part.strip().lower() for part in directive.partition(":"))
            if colon and not prefix.startswith(("max-", "unavailable_after")):
                addressed_to, prefix = prefix, rest
            if prefix in OPT_OUT_DIRECTIVES and addressed_to in {"*", name}:
                return True
    return False


class Cache:
    """Content-addressed store: ``objects/<sha256>`` holds bytes, ``urls/<sha256>.json`` points at them."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def _entry(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()
        return self.root / "urls" / digest[:2] / f"{digest}.json"

    def _object(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / digest

    def get(self, url: str) -> Fetched | None:
        """Return what is stored for ``url``; None if nothing is, or if the stored bytes are damaged."""
        try:
            entry = json.loads(self._entry(url).read_text())
            data = self._object(entry["sha256"]).read_bytes()
        except (OSError, ValueError, KeyError):
            return None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            return None
        return Fetched(
            url, data, entry["sha256"], entry["extension"], entry["width"], entry["height"], cached=True
        )

    def put(self, item: Fetched) -> None:
        """Store a fetched picture; the bytes are in place before the entry that names them."""
        if item.data is None or item.sha256 is None:
            raise ValueError(f"only a fetched picture can be cached, {item.url} failed: {item.reason}")
        self._write(self._object(item.sha256), item.data)
        entry = {
            "url": item.url,
            "sha256": item.sha256,
            "extension": item.extension,
            "width": item.width,
            "height": item.height,
        }
        self._write(self._entry(item.url), json.dumps(entry).encode())

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, sync=False)


class Fetcher:
    """Fetches pictures under a :class:`FetchPolicy`.

    >>> with_cache = Fetcher(cache="cache/images")
    >>> for item in with_cache.fetch(addresses):  # doctest: +SKIP
    ...     print(item.url, item.reason or item.sha256)
    """

    def __init__(self, policy: FetchPolicy | None = None, cache: str | Path | None = None) -> None:
        self.policy = policy or FetchPolicy()
        self.cache = Cache(cache) if cache is not None else None

    def fetch(
        self, urls: Iterable[str], on_result: Callable[[Fetched], None] | None = None
    ) -> Iterator[Fetched]:
        """Fetch every address concurrently; results in the order given, each address asked for once."""
        wanted = list(urls)
        found: dict[str, Fetched] = {}

        def take(item: Fetched) -> None:
            found[item.url] = item
            if on_result is not None:
                on_result(item)

        self.deliver(wanted, take)
        for url in wanted:
            yield found[url]

    def deliver(self, urls: Iterable[str], take: Callable[[Fetched], None]) -> None:
        """Fetch every address once and hand over each result as it arrives; none is held afterwards."""
        unique = list(dict.fromkeys(urls))

        async def run() -> None:
            async for item in self.stream(unique):
                take(item)

        if unique:
            asyncio.run(run())

    async def stream(self, urls: Iterable[str]) -> AsyncIterator[Fetched]:
        """Yield results as they arrive."""
        import aiohttp  # heavy, and only downloads need it

        policy = self.policy
        guard = Guard(lambda host, port: host in policy.allow_hosts or f"{host}:{port}" in policy.allow_hosts)
        resolver: Any = guard
        connector = aiohttp.TCPConnector(
            limit=policy.concurrency,
            limit_per_host=policy.per_host,
            resolver=resolver,
            socket_factory=guard.socket,
            use_dns_cache=False,  # every hop is resolved and judged anew
            force_close=True,
        )
        gates: dict[str, asyncio.Semaphore] = {}
        slots = asyncio.Semaphore(policy.concurrency)

        # An item keeps its slot until it is taken, and nothing holds it afterwards: bodies cannot fill the memory.
        done: asyncio.Queue[Fetched] = asyncio.Queue(1)
        self._large, self._decoding = asyncio.Semaphore(_LARGE_AT_ONCE), asyncio.Semaphore(_DECODED_AT_ONCE)

        async def one(url: str) -> None:
            host = _host(url)
            async with slots, gates.setdefault(host, asyncio.Semaphore(policy.per_host)):
                await done.put(await self._fetch(session, guard, url))

        async with aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # a compressed body is a bomb's second coat; we ask for identity
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            headers={"User-Agent": policy.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
        ) as session:
            tasks = [asyncio.ensure_future(one(url)) for url in urls]
            try:
                for _ in tasks:
                    yield await self._next(done, tasks)
            finally:
                for task in tasks:
                    task.cancel()

    @staticmethod
    async def _next(done: asyncio.Queue[Fetched], tasks: Sequence[asyncio.Future[None]]) -> Fetched:
        """The item that comes next, or the exception of a task that will put none."""
        taken = asyncio.ensure_future(done.get())
        running = {task for task in tasks if not task.done()}
        while not taken.done():
            ended, running = await asyncio.wait({taken, *running}, return_when=asyncio.FIRST_COMPLETED)
            running.discard(taken)
            for task in ended:
                task.result()
        return taken.result()

    async def _fetch(self, session: aiohttp.ClientSession, guard: Guard, url: str) -> Fetched:
        if self.cache is not None and (hit := self.cache.get(url)) is not None:
            return hit
        attempts, reason = 0, "deadline"
        try:
            async with asyncio.timeout(self.policy.deadline):
                for attempt in range(self.policy.retries + 1):
                    attempts += 1
                    try:
                        item = await self._attempt(session, guard, url)
                    except Transient as failure:
                        reason = str(failure)
                        if attempt < self.policy.retries:
                            await asyncio.sleep(self.policy.backoff * 2**attempt)
                        continue
                    if self.cache is not None:
                        self.cache.put(item)
                    return Fetched(**{**item.__dict__, "attempts": attempts})
        except Refused as failure:
            reason = str(failure)
        except TimeoutError:
            reason = "deadline"
        return Fetched(url, reason=reason, attempts=attempts)

    async def _attempt(self, session: aiohttp.ClientSession, guard: Guard, url: str) -> Fetched:
        """Follow one chain of redirects to a picture."""
        import aiohttp

        address = url
        silence = aiohttp.ClientTimeout(
            total=None, sock_connect=self.policy.stall, sock_read=self.policy.stall
        )
        for _ in range(self.policy.max_redirects + 1):
            check_address(address, self.policy, guard)
            try:
                async with session.get(
                    address,
                    allow_redirects=False,
                    timeout=silence,
                ) as response:
                    if response.status in REDIRECTS:
                        target = response.headers.get("Location")
                        if not target:
                            raise Refused("redirect without a target")
                        address = urljoin(address, target)
                        continue
                    return await self._read(url, response)
            except (Refused, Transient):
                raise
            except TimeoutError:
                raise Transient("stalled") from None
            except aiohttp.InvalidURL:
                raise Refused("bad address") from None
            except aiohttp.ClientPayloadError:
                raise Transient("truncated") from None
            except (aiohttp.ClientError, OSError, ValueError) as failure:
                cause: BaseException | None = failure
                while cause is not None:  # the guard's refusal arrives wrapped
                    if isinstance(cause, PrivateAddress):
                        raise Refused("private address") from None
                    cause = cause.__cause__ or cause.__context__
                raise Transient("connection failed") from None
        raise Refused("too many redirects")

    async def _read(self, url: str, response: aiohttp.ClientResponse) -> Fetched:
        status = response.status
        if status in TRANSIENT_STATUS:
            raise Transient(f"http {status}")
        if status != 200:
            raise Refused(f"http {status}")
        if opted_out(response.headers.getall("X-Robots-Tag", []), self.policy.user_agent):
            raise Refused("opted out (X-Robots-Tag)")
        if response.headers.get("Content-Encoding", "identity").lower() not in {"identity", ""}:
            raise Refused("compressed body")
        limit = self.policy.max_bytes
        if (response.content_length or 0) > limit:
            raise Refused("too many bytes")
        body = bytearray()
        async with AsyncExitStack() as held:
            async for chunk in response.content.iter_chunked(2**16):
                if len(body) <= _LARGE < len(body) + len(chunk):
                    await held.enter_async_context(self._large)
                body += chunk
                if len(body) > limit:
                    raise Refused("too many bytes")
            data = bytes(body)
            del body
            extension, width, height = sniff(data, self.policy.max_pixels)
            async with self._decoding:
                await asyncio.to_thread(check_decodes, data)
        return Fetched(url, data, hashlib.sha256(data).hexdigest(), extension, width, height)


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""


def check_address(url: str, policy: FetchPolicy, guard: Guard) -> None:
    """Refuse what is not http(s), carries credentials, or names a private address outright.

    Raises:
        Refused: with the reason that reports count.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Refused("bad address") from None
    if parts.scheme not in {"http", "https"}:
        raise Refused("not http(s)")
    if not host or parts.username is not None or parts.password is not None:
        raise Refused("bad address")
    if guard.exempt(host, port or (443 if parts.scheme == "https" else 80)):
        return
    try:
        public = is_public(host)
    except ValueError:
        return  # a name: the guard judges what it stands for
    if not public:
        raise Refused("private address")
