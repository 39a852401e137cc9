"""Finding shards: folders, globs, brace patterns, tars and URLs to where each shard and its index are."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ....models.inside import inside
from ....models.received import MAX_SETTINGS, blaming, read_bytes
from ..report import SkipReport
from .index import ShardIndex, index_path
from .made_by import how_to_make
from .remote import (
    RETRY_SECONDS,
    AddressError,
    cached_index,
    check_there,
    is_local,
    masked,
    names_in,
    open_address,
    read_whole,
    side_by_side,
)
from .writer import MANIFEST

MAX_SHARDS = 1_000_000  # that one pattern may name


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the header of a shard's index says, and where the shard is; ``index`` is a local path."""

    name: str
    url: str
    index: str
    kind: str
    samples: int
    bytes: int
    tokens: int
    images: int
    sha256: str
    columns_sha256: str
    dialogues: int = 0


class Found(NamedTuple):
    """A shard that a source names: its address, and what a manifest says of it, if one lists it."""

    url: str
    samples: int | None = None
    index_sha256: str | None = None


def shard_info(found: Found, retry_seconds: float = RETRY_SECONDS) -> ShardInfo:
    """Read the header of a shard's index; of a remote one see that shard and index are what is there now.

    Raises:
        FileNotFoundError: no shard or no index.
        ValueError: unreadable index, or a shard that a manifest lists is not there.
        OutsideFault: a server does not answer for ``retry_seconds``.
    """
    url, path = found.url, index_path(found.url)
    if is_local(url):
        if not os.path.exists(url):
            raise FileNotFoundError(f"no shard at {url}")
        header = ShardIndex(path).header
        return _info(header, url, path)
    copy = cached_index(path, found.index_sha256, retry_seconds)
    info = _info(ShardIndex(copy).header, url, copy)
    check_there(url, info.bytes, retry_seconds)
    return info


def _info(header: Mapping[str, Any], url: str, index: str) -> ShardInfo:
    return ShardInfo(
        name=header["shard"],
        url=url,
        index=index,
        kind=header["kind"],
        samples=header["samples"],
        bytes=header["bytes"],
        tokens=header["tokens"],
        images=header["images"],
        sha256=header["sha256"],
        columns_sha256=header["columns_sha256"],
        dialogues=dialogues if isinstance(dialogues := header["metadata"].get("dialogues"), int) else 0,
    )


def shard_infos(
    found: Sequence[Found], retry_seconds: float = RETRY_SECONDS
) -> list[ShardInfo | FileNotFoundError | ValueError]:
    """:func:`shard_info` of many, or what each raises; servers are asked for many together.

    Raises:
        ValueError: a remote shard is not what its manifest lists: the upload is not whole.
        OutsideFault: as there.
    """

    def attempt(one: Found) -> ShardInfo | FileNotFoundError | ValueError:
        try:
            return shard_info(one, retry_seconds)
        except AddressError:
            raise
        except FileNotFoundError as error:
            if one.samples is not None and not is_local(one.url):
                return ListedShardError(
                    f"{masked(one.url)} is in the manifest of its folder, but the server has it not ({error}); upload "
                    "it, or write the manifest again"
                )
            return error
        except ValueError as error:
            return error if one.samples is None or is_local(one.url) else ListedShardError(str(error))

    if all(is_local(one.url) for one in found):
        return [attempt(one) for one in found]
    outcomes = side_by_side(attempt, found)
    missing = [outcome for outcome in outcomes if isinstance(outcome, ListedShardError)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ListedShardError(f"{missing[0]}{more}")
    return outcomes


class ListedShardError(ValueError):
    """A shard that a remote manifest lists and the server has not, or has another."""


def expand(source: str, report: SkipReport, retry_seconds: float = RETRY_SECONDS) -> list[Found]:
    """Every shard that a source names, in order."""
    if source.startswith("pipe:"):
        raise ValueError(f"{source!r} given, expected a path or URL: commands are never run to read data")
    if "{" in source:
        return [found for part in _braces(source) for found in expand(part, report, retry_seconds)]
    if source.endswith(".tar") and "*" not in source:
        return [Found(source)]
    filesystem, path = open_address(source)
    prefix = "" if is_local(source) else source.partition("://")[0] + "://"
    if "*" in source:
        names = filesystem.glob(path) if is_local(source) else names_in(source, retry_seconds)
        return [
            Found(name if "://" in name else prefix + name) for name in sorted(names) if name.endswith(".tar")
        ]
    root = (str(path) if is_local(source) else source).rstrip("/")
    listed: dict[str, int] = {}
    hashes: dict[str, str] = {}
    content = _manifest(root, retry_seconds)
    if content is not None:
        listed, hashes = _listed(content, root)
    if is_local(source):
        if not os.path.isdir(root):
            raise FileNotFoundError(
                f"no data at {source}; {how_to_make(source) or 'give a folder of shards, or a .tar'}."
            )
        there = {name for name in os.listdir(root) if name.endswith(".tar") and not name.startswith(".")}
    else:
        there = set()
        if not listed:
            there = {
                name.rpartition("/")[2] for name in names_in(source, retry_seconds) if name.endswith(".tar")
            }
    return [Found(f"{root}/{name}", listed.get(name), hashes.get(name)) for name in sorted({*listed, *there})]


def _manifest(root: str, retry_seconds: float) -> bytes | None:
    place = f"{root}/{MANIFEST}"
    if not is_local(root):
        return read_whole(place, retry_seconds)
    return read_bytes(Path(place)) if os.path.exists(place) else None


def _index_hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Shard name to SHA-256 of its index, which names a file of the cache: nothing else may come of it."""
    found = {str(entry["shard"]): str(entry.get("index_sha256")) for entry in manifest["shards"]}
    return {name: value for name, value in found.items() if re.fullmatch("[0-9a-f]{64}", value)}


def _braces(source: str) -> list[str]:
    """What a brace pattern names, counted before it is expanded.

    Raises:
        ValueError: more than ``MAX_SHARDS``.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue]

    count = 1
    for first, last, step in re.findall(r"\{(-?\w+)\.\.(-?\w+)(?:\.\.(-?\d+))?\}", source):
        digits = len(first) > 18 or len(last) > 18
        if first.lstrip("-").isdecimal() and last.lstrip("-").isdecimal():
            count *= (
                MAX_SHARDS + 1 if digits else 1 + abs(int(last) - int(first)) // max(1, abs(int(step or 1)))
            )
    try:
        found = braceexpand(source) if count <= MAX_SHARDS else iter(())
        names = list(islice(found, MAX_SHARDS + 1))
    except (UnbalancedBracesError, RecursionError) as error:
        raise ValueError(f"{source!r} is not a brace pattern such as {{000..099}}.tar; check it.") from error
    if not names or len(names) > MAX_SHARDS:
        raise ValueError(f"{source!r} names more than {MAX_SHARDS:,} shards; give fewer at a time.")
    return names


def _listed(content: bytes, root: str) -> tuple[dict[str, int], dict[str, str]]:
    """Shard name to sample count, and to the SHA-256 of its index, of a manifest, which may be anybody's.

    Raises:
        ValueError: it is damaged, or names something that does not lie in its folder.
    """
    if len(content) > MAX_SETTINGS:
        raise ValueError(f"{root}/{MANIFEST} is larger than the {MAX_SETTINGS:,} bytes that it may have.")
    with blaming(f"{root}/{MANIFEST}", "build the index again"):
        try:
            manifest = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{root}/{MANIFEST} is not JSON ({error}); build the index again.") from None
        listed = {str(entry["shard"]): int(entry["samples"]) for entry in manifest["shards"]}
        hashes = _index_hashes(manifest)
    for name in listed:
        if "://" in root:
            inside(os.curdir, name, follow_links=True)  # as written: it becomes part of an address
        else:
            inside(root, name)
    return listed, hashes


def distinct_names(infos: list[ShardInfo]) -> list[ShardInfo]:
    """Shards whose names differ: of joined folders, which often repeat 000000.tar, as much of the path as it takes.

    Names identify shards in fingerprints and reports, so they do not change with the folder that all lie in.

    Raises:
        ValueError: one shard is given twice.
    """
    if len({info.name for info in infos}) == len(infos):
        return infos
    places = Counter(os.path.abspath(info.url) if is_local(info.url) else info.url for info in infos)
    twice = [place for place, count in places.items() if count > 1]
    if twice:
        raise ValueError(f"the shard {twice[0]} is given twice, expected distinct shards")
    parts = [(os.path.abspath(info.url) if is_local(info.url) else info.url).split("/") for info in infos]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(infos):
            break
    return [replace(info, name=name) for info, name in zip(infos, names, strict=True)]
