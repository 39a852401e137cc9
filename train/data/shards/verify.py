"""Is a folder of shards whole? Says everything that is not.

For every shard: the index is there, belongs to it and is intact; the tar has the size and sha256 that the
index says; members lie where the index says; samples spread over the shard decode. For the folder: every
shard of the manifest is there, and no tar is without an index. Indexes also remember what could not be read
when they were made: damage among that counts here too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..decode import Picture
from ..documents.records import CHOSEN
from ..names import CAPTION_EXTENSIONS, is_image
from ..pairs.captions import METADATA
from ..report import BadSample, SkipReport
from ..text import CONTROLS, SURROGATES
from .index import ShardIndex, file_sha256, index_path
from .reader import Record, ShardReader, ShardSet
from .scan import BEHIND_END, iterate_members, split_name
from .writer import MANIFEST

# What indexing a foreign tar, or converting documents, may note without the shard being damaged.
_HARMLESS = frozenset(
    {
        "extension not allowed",
        "not a regular file",
        "duplicate key",
        "hidden or system file",
        SURROGATES,
        CONTROLS,
        METADATA,
        "lone surrogate read as U+FFFD",
        "special token in text removed",
    }
)


def verify_folder(
    root: str | Path,
    *,
    decode_samples: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Everything that is wrong with a folder of shards, one line each; empty when it is whole.

    Args:
        root: searched recursively.
        decode_samples: how many samples a shard are decoded in full, evenly spread.
        progress: called with (shards done, shards in all).

    Raises:
        FileNotFoundError: no such folder, or no shard in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}, expected one with shards")
    tars = sorted(path for path in root.rglob("*.tar") if not path.name.startswith("."))
    indexes = sorted(root.rglob("*.idx"))
    if not tars and not indexes:
        raise FileNotFoundError(f"no shard in {root}, expected .tar files with their indexes")
    problems = [problem for manifest in sorted(root.rglob(MANIFEST)) for problem in _check_manifest(manifest)]
    for index in indexes:
        if not index.with_suffix(".tar").exists():
            problems.append(f"{index.relative_to(root)}: its tar is missing")
    for number, tar in enumerate(tars):
        progress(number, len(tars))
        problems += [f"{tar.relative_to(root)}: {text}" for text in verify_shard(tar, decode_samples)]
    progress(len(tars), len(tars))
    return problems


def _harmless(reason: str) -> bool:
    return reason in _HARMLESS or reason.startswith(CHOSEN)


def _check_manifest(path: Path) -> list[str]:
    try:
        listed = {entry["shard"]: entry for entry in json.loads(path.read_text())["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path}: not a manifest ({type(error).__name__}: {error})"]
    problems = []
    for name, entry in listed.items():
        tar = path.parent / name
        if not tar.exists():
            problems.append(f"{tar}: missing, with {entry['samples']} samples")
        elif os.path.exists(index_path(tar)):
            try:
                header = ShardIndex(index_path(tar)).header
            except ValueError:
                continue  # reported with the shard
            if header["sha256"] != entry["sha256"]:
                problems.append(f"{tar}: not the shard that {MANIFEST} lists")
    return problems


def verify_shard(tar: str | Path, decode_samples: int = 16) -> list[str]:
    """What is wrong with one shard, one line each."""
    try:
        index = ShardIndex(index_path(tar))
    except FileNotFoundError:
        return ["has no index"]
    except ValueError as error:
        return [str(error)]
    header = index.header
    try:
        intact = index.digest() == header["columns_sha256"]
    except ValueError as error:
        return [str(error)]
    if not intact:
        return ["index damaged: its columns are not those it was written with"]
    problems = [
        f"{entry['count']} × {reason} when it was indexed: {', '.join(entry['names'][:3])}"
        for reason, entry in header["report"]["reasons"].items()
        if header["metadata"].get("build") is None
        and (entry.get("lost", True) or reason == BEHIND_END)
        and not _harmless(reason)
    ]
    size = os.path.getsize(tar)
    if size != header["bytes"]:
        problems.append(f"{size} bytes, its index says {header['bytes']}")
    elif file_sha256(tar) != header["sha256"]:
        problems.append("sha256 differs from its index")
    if header["shard"] != Path(tar).name:
        problems.append(f"its index is that of {header['shard']}")
    return problems + _check_members(tar, index) + _check_samples(tar, index, decode_samples)


def _check_members(tar: str | Path, index: ShardIndex) -> list[str]:
    """The tar's own headers against the index."""
    there = {}
    for name, offset, length in iterate_members(tar, SkipReport()):
        key, extension = split_name(name.removeprefix("./"))
        there[offset] = (key, extension, length)
    wrong = 0
    example = ""
    for sample in range(len(index)):
        key = index.key(sample)
        for member in index.members(sample):
            if there.get(member.offset) != (key, member.extension, member.length):
                wrong += 1
                example = example or f"{key}.{member.extension}"
    return [f"{wrong} members are not where the index says, the first is {example}"] if wrong else []


def _check_samples(tar: str | Path, index: ShardIndex, decode_samples: int) -> list[str]:
    """Every sample against its checksum, some of them decoded."""
    samples = len(index)
    if not samples:
        return []
    suffixes = frozenset(extension.rpartition(".")[2] for extension in index.extensions)
    report = SkipReport(max_names=3)
    reader = ShardReader(ShardSet.open([tar], max_skip_rate=1.0), allowed=suffixes)
    decoded = set(np.linspace(0, samples - 1, min(samples, decode_samples)).astype(int).tolist())
    for sample in range(samples):
        try:
            record = reader.read(sample)
            if sample in decoded:
                check_record(record)
        except BadSample as bad:
            report.add_bad(bad)
    return [f"samples unreadable: {line}" for line in report.lines()]


def check_record(record: Record) -> None:
    """Decode all of a record.

    Raises:
        BadSample: at the first member that is broken.
    """
    for extension, data in record.members.items():
        last = extension.rpartition(".")[2]
        if is_image(extension) or last in ("png", "jpg", "jpeg", "webp"):
            Picture(data, f"{record.name}.{extension}").decode()
        elif last in CAPTION_EXTENSIONS:
            record.text(extension)
        elif last == "json":
            record.json(extension)
