"""Finding shards: folders, globs, brace patterns, tars and URLs to where each shard and its index are."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, replace

import fsspec

from .index import ShardIndex, index_path
from .made_by import how_to_make
from .report import SkipReport
from .shards import MANIFEST


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the header of a shard's index says, and where the shard is."""

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


def is_local(url: str) -> bool:
    """Whether a shard is a local file."""
    return "://" not in url


def local_copy(url: str) -> str:
    """The path of a local file with the content of ``url``; remote indexes are fetched once."""
    if is_local(url):
        return url
    return fsspec.open_local(
        f"filecache::{url}", filecache={"cache_storage": _cache_folder(), "check_files": True}
    )  # type: ignore[return-value]


def _cache_folder() -> str:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(root, "interloom", "indexes")


def shard_info(url: str) -> ShardInfo:
    """Read the header of a shard's index.

    Raises:
        FileNotFoundError: no shard or no index.
        ValueError: unreadable index.
    """
    if is_local(url) and not os.path.exists(url):
        raise FileNotFoundError(f"no shard at {url}")
    path = index_path(url)
    header = ShardIndex(local_copy(path)).header
    return ShardInfo(
        name=header["shard"],
        url=url,
        index=path,
        kind=header["kind"],
        samples=header["samples"],
        bytes=header["bytes"],
        tokens=header["tokens"],
        images=header["images"],
        sha256=header["sha256"],
        columns_sha256=header["columns_sha256"],
    )


def expand(source: str, report: SkipReport) -> list[tuple[str, int | None]]:
    """(tar URL, sample count if a manifest lists it) for everything a source names."""
    if source.startswith("pipe:"):
        raise ValueError(f"{source!r} given, expected a path or URL: commands are never run to read data")
    if "{" in source:
        from braceexpand import braceexpand

        return [found for part in braceexpand(source) for found in expand(part, report)]
    if source.endswith(".tar") and "*" not in source:
        return [(source, None)]
    filesystem, path = fsspec.core.url_to_fs(source)
    prefix = "" if is_local(source) else source.partition("://")[0] + "://"
    if "*" in source:
        return [(prefix + name, None) for name in sorted(filesystem.glob(path)) if str(name).endswith(".tar")]
    root = (str(path) if is_local(source) else source).rstrip("/")
    listed: dict[str, int] = {}
    if filesystem.exists(f"{path.rstrip('/')}/{MANIFEST}"):
        manifest = json.loads(filesystem.cat_file(f"{path.rstrip('/')}/{MANIFEST}"))
        listed = {str(entry["shard"]): int(entry["samples"]) for entry in manifest["shards"]}
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
                str(n).rpartition("/")[2]
                for n in filesystem.ls(path, detail=False)
                if str(n).endswith(".tar")
            }
    return [(f"{root}/{name}", listed.get(name)) for name in sorted({*listed, *there})]


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
        raise ValueError(f"the shard {twice[0]} is given twice, expected each shard once")
    parts = [(os.path.abspath(info.url) if is_local(info.url) else info.url).split("/") for info in infos]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(infos):
            break
    return [replace(info, name=name) for info, name in zip(infos, names, strict=True)]
