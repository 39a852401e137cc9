"""The images of documents: their bytes from wherever a record says, their sizes from the header, then their pixels.

Three steps, so that nothing costs more than it must: :meth:`ImageLoader.located` finds the bytes and looks at the
header, the filters of :mod:`.records` drop what they drop, and :meth:`ImageLoader.checked` decodes what is left, each
picture once. Downloads wait on disk, and a document's images are bounded together, so that a record of a few
addresses cannot fill the memory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ....models.inside import Outside, inside, is_inside
from ....models.pictures import FORMATS, MAX_BYTES, MAX_PIXELS, PictureError, open_picture, read_picture_file
from ..decode import Picture as EncodedPicture
from ..download import Fetched, Fetcher
from ..report import BadSample, SkipReport
from .options import ConvertOptions
from .records import Document, Picture

# Of one document, encoded.
MAX_DOCUMENT = 256 * 2**20
# Documents whose addresses are fetched together, and addresses that end a group.
_GROUP, _ADDRESSES = 256, 512


class ImageLoader:
    """Loads images as ``options`` allow and tells ``report`` of those that cannot be had.

    Use as a context manager: downloads lie in a temporary folder meanwhile.
    """

    def __init__(self, options: ConvertOptions, report: SkipReport) -> None:
        self.options, self.report = options, report
        self._max_pixels = options.fetch_policy.max_pixels if options.fetch else MAX_PIXELS
        self._spool: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ImageLoader:
        if self.options.fetch:
            self._spool = tempfile.TemporaryDirectory(prefix="interloom-fetched-")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spool is not None:
            self._spool.cleanup()

    def located(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Documents whose pictures have bytes, type and size; those that cannot be had stay without bytes."""
        if self._spool is None:
            for document in documents:
                yield self._locate(document, {})
            return
        for group in self._groups(documents):
            fetched = self._fetch(group, Path(self._spool.name))
            for document in group:
                yield self._locate(document, fetched)
            for found in fetched.values():
                if isinstance(found, Path):
                    found.unlink(missing_ok=True)

    def checked(self, document: Document) -> Document:
        """The document whose pictures are as they will be stored; broken ones lose their bytes."""
        stored: dict[bytes, Picture | BadSample] = {}

        def check(picture: Picture) -> Picture:
            if picture.data is None:
                return picture
            digest = hashlib.sha256(picture.data).digest()
            if digest not in stored:
                try:
                    encoded = EncodedPicture(picture.data, picture.src, self._max_pixels)
                    extension, data = encoded.stored(self.options.max_side)
                    stored[digest] = Picture(None, "", encoded.width, encoded.height, extension, data)
                except BadSample as bad:
                    stored[digest] = bad
            made = stored[digest]
            if isinstance(made, BadSample):
                raise made
            return replace(
                picture, data=made.data, extension=made.extension, width=made.width, height=made.height
            )

        return self._each(document, check)

    def _locate(self, document: Document, fetched: dict[str, Path | str]) -> Document:
        total = 0

        def locate(picture: Picture) -> Picture:
            nonlocal total
            if total > MAX_DOCUMENT:
                raise BadSample(f"over {MAX_DOCUMENT >> 20} MiB in one document", picture.src)
            data = self._bytes(picture, fetched)
            total += len(data)
            if total > MAX_DOCUMENT:
                raise BadSample(f"over {MAX_DOCUMENT >> 20} MiB in one document", picture.src)
            try:
                image = open_picture(data, picture.src, self._max_pixels)
            except PictureError as error:
                raise BadSample(error.reason, picture.src, error.detail) from None
            width, height = image.size
            return replace(
                picture, data=data, extension=FORMATS[str(image.format)], width=width, height=height
            )

        return self._each(document, locate)

    def _each(self, document: Document, change: Callable[[Picture], Picture]) -> Document:
        """The document with every picture changed, or without its bytes where that failed."""
        parts: list[str | Picture] = []
        for part in document.parts:
            if isinstance(part, Picture):
                try:
                    part = change(part)
                except BadSample as bad:
                    self.report.add(f"image: {bad.reason}", document.key, part.src[:200])
                    part = replace(part, data=None)
            parts.append(part)
        return replace(document, parts=tuple(parts))

    def _bytes(self, picture: Picture, fetched: dict[str, Path | str]) -> bytes:
        """What a record says its image is.

        Raises:
            BadSample: with the reason why there is none.
        """
        source = self._chosen(picture)
        if isinstance(source, str) and is_address(source):
            if not self.options.fetch:
                raise BadSample("only an address (use --fetch)", source)
            found = fetched[source]
            if isinstance(found, str):
                raise BadSample(found, source)
            return found.read_bytes()
        if isinstance(source, str):
            return self._file(source)
        if isinstance(source, bytes | bytearray | memoryview):
            if len(source) > MAX_BYTES:
                raise BadSample("too many bytes", picture.src)
            return bytes(source)
        raise BadSample(f"unknown kind {type(source).__name__}", picture.src)

    def _chosen(self, picture: Picture) -> Any:
        """Of a picture named in several ways the one at hand: bytes, a file that is there, an address."""
        source = picture.source
        if not isinstance(source, dict):
            return source
        path, address, root = source.get("path"), source.get("url"), self.options.image_root
        if isinstance(address, str) and address and not source.get("bytes"):
            named = isinstance(path, str) and root is not None and is_inside(root, path)
            return path if named and os.path.isfile(os.path.join(str(root), str(path))) else address
        return source.get("bytes") or path

    def _file(self, name: str) -> bytes:
        root = self.options.image_root
        if root is None:
            raise BadSample("only a path (use --image-root)", name)
        try:
            return read_picture_file(inside(root, name))
        except Outside:
            raise BadSample("path leads out of the image folder", name) from None
        except PictureError as error:
            raise BadSample(error.reason, name, error.detail) from None

    def _fetch(self, documents: list[Document], folder: Path) -> dict[str, Path | str]:
        """Address to the file that holds what came from it, or to the reason why nothing did."""
        addresses = sorted({address for document in documents for address in self._addresses(document)})
        found: dict[str, Path | str] = {}

        def take(item: Fetched) -> None:
            if item.data is None:
                found[item.url] = item.reason or "not fetched"
                return
            path = folder / f"{os.getpid()}-{len(found)}"
            path.write_bytes(item.data)
            found[item.url] = path

        Fetcher(self.options.fetch_policy, self.options.fetch_cache).deliver(addresses, take)
        return found

    def _addresses(self, document: Document) -> Iterator[str]:
        for picture in document.pictures:
            source = self._chosen(picture)
            if isinstance(source, str) and is_address(source):
                yield source

    def _groups(self, documents: Iterator[Document]) -> Iterator[list[Document]]:
        group: list[Document] = []
        addresses = 0
        for document in documents:
            group.append(document)
            addresses += sum(1 for _ in self._addresses(document))
            if len(group) >= _GROUP or addresses >= _ADDRESSES:
                yield group
                group, addresses = [], 0
        if group:
            yield group


def is_address(source: str) -> bool:
    """Whether an image is named by a web address."""
    return "://" in source
