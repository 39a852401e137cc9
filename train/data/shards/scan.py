"""Reading the members of a tar that somebody else wrote, whatever state it is in.

Member headers are all that is interpreted; contents are checksummed, never unpacked. After damage the search
goes on at the next header, and every member that is left out is accounted for.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ....models.received import check_regular
from ..names import is_litter, name_problem
from ..report import SkipReport, printable
from .index import ALLOWED_EXTENSIONS, Entry, Member

# Why a tar is noted: tools that joined tars by appending them leave samples where no reader looks.
BEHIND_END = "bytes behind the end marker"
_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unzstd"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"PK\x03\x04", "zip", "unzip"),
)
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


def split_name(name: str) -> tuple[str, str]:
    """``dir/key.a.b`` as (``dir/key``, ``a.b``): the WebDataset rule, extension from the first dot."""
    directory, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}{slash}{stem}", extension.lower()


def refuse_compressed(path: str | Path) -> None:
    """Say what to do with a tar whose members have no fixed place.

    Raises:
        ValueError: it is compressed.
    """
    check_regular(path)
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, kind, tool in _COMPRESSED:
        if head.startswith(magic):
            raise ValueError(
                f"{path} is a compressed tar ({kind}), expected a plain one, which can be read from any byte; unpack "
                f"it with `{tool}` first and index the .tar"
            )


def _parse_header(block: bytes) -> tarfile.TarInfo | None:
    """The member header in a block; None where there is none. Never raises on any 512 bytes."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if info.size >= 0 else None


def _pax_records(data: bytes) -> dict[str, str]:
    """``length key=value`` records of a pax header; malformed rest is ignored, as the name then stays."""
    records: dict[str, str] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 1 < int(digits) <= len(data):
            break
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(digits) :]
    return records


def iterate_members(path: str | Path, report: SkipReport) -> Iterable[tuple[str, int, int]]:
    """(name, data offset, length) of every regular file of a tar; damage goes into ``report``.

    A block that should be a header and is not one is counted, and the search goes on at the next block that
    is: a flipped byte costs one member, not the rest of the shard (``tarfile`` would stop without a word).
    """
    shard = Path(path).name
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            report.add("empty tar", shard)
            return
        position, lost_from, long_name, zero_blocks = 0, None, None, 0
        pax_size: int | None = None
        while position < size:
            block = os.pread(file.fileno(), _BLOCK, position)
            if len(block) < _BLOCK:
                break
            if block.count(0) == _BLOCK and lost_from is None:
                zero_blocks += 1
                position += _BLOCK
                if zero_blocks == 2:
                    if behind := _bytes_behind(file.fileno(), position, size):
                        report.note(BEHIND_END, shard, f"from byte {behind} of {size}")
                    return
                continue
            info = _parse_header(block)
            if info is None:
                if lost_from is None:
                    lost_from = position
                position += _BLOCK
                continue
            zero_blocks = 0
            if lost_from is not None:
                report.add("unreadable tar header", shard, f"bytes {lost_from} to {position}")
                lost_from, long_name, pax_size = None, None, None
            start = position + _BLOCK
            if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
                if info.size > 1 << 20 or start + info.size > size:
                    report.add("unreadable tar header", shard, f"extended header at byte {position}")
                    position = start
                    continue
                data = os.pread(file.fileno(), info.size, start)
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif info.type == tarfile.XHDTYPE:
                    records = _pax_records(data)
                    long_name = records.get("path", long_name)
                    pax_size = int(records["size"]) if records.get("size", "").isdigit() else pax_size
            else:
                name, long_name = long_name or info.name, None
                length, pax_size = (info.size if pax_size is None else pax_size), None
                if start + length > size:
                    report.add("truncated tar", shard, f"{printable(name)} ends past the file")
                    return
                info.size = length
                if info.isreg() and info.type != tarfile.GNUTYPE_SPARSE:
                    yield name, start, length
                elif not info.isdir():
                    report.note("not a regular file", f"{shard}/{printable(name)}")
                    if info.islnk() or info.issym():
                        info.size = 0
            position = start + (info.size + _BLOCK - 1) // _BLOCK * _BLOCK
        if lost_from is not None:
            report.add("unreadable tar header", shard, f"bytes {lost_from} to {size}")
        report.add("truncated tar", shard, "no end marker")


def _bytes_behind(handle: int, position: int, size: int) -> int:
    """Where the first byte that is not zero lies from ``position`` on; 0 where there is none."""
    while position < size:
        data = os.pread(handle, 1 << 20, position)
        if not data:
            break
        if kept := data.lstrip(b"\0"):
            return position + len(data) - len(kept)
        position += len(data)
    return 0


def scan_tar(
    path: str | Path,
    *,
    allowed: frozenset[str] = ALLOWED_EXTENSIONS,
    requires: Sequence[frozenset[str]] = (),
    report: SkipReport | None = None,
    checksums: bool = True,
) -> tuple[list[Entry], SkipReport]:
    """Entries of a tar for :func:`write_index`, and the report of everything left out.

    Args:
        path: a plain local tar; :func:`refuse_compressed` tells others.
        allowed: last suffixes of members to index.
        requires: for each group, a sample needs a member whose extension is in it; else it is left out.
        report: where to count; a new one by default.
        checksums: false reads the headers alone, and leaves the members' checksums at 0.

    Successive members with one key form a sample, as in WebDataset; a repeated extension under the same key
    starts a new sample, so that duplicate keys lose nothing (they are counted).
    """
    check_regular(path)
    report = report if report is not None else SkipReport()
    shard, groups, keys = Path(path).name, [], set()
    extensions: set[str] = set()  # of the sample that is being gathered
    with open(path, "rb") as file:
        for name, offset, length in iterate_members(path, report):
            shown = f"{shard}/{printable(name)}"
            if problem := name_problem(name):
                report.add("hostile name", shown, problem)
                continue
            if is_litter(name):
                report.note("hidden or system file", shown)
                continue
            key, extension = split_name(name.removeprefix("./"))
            if extension.rpartition(".")[2] not in allowed:
                report.note("extension not allowed", shown)
                continue
            if not groups or groups[-1].key != key:
                groups.append(Entry(key))
                if key in keys:
                    report.note("duplicate key", shown)
                keys.add(key)
                extensions = set()
            elif extension in extensions:
                report.note("duplicate key", shown)
                groups.append(Entry(key))
                extensions = set()
            extensions.add(extension)
            crc = _crc32_range(file.fileno(), offset, length) if checksums else 0
            groups[-1].members.append(Member(extension, offset, length, crc))
    entries = []
    for entry in groups:
        have = {member.extension for member in entry.members}
        missing = [group for group in requires if not have & group]
        if missing:
            detail = "; ".join("no " + " or ".join(sorted(group)) for group in missing)
            report.add("incomplete sample", f"{shard}/{printable(entry.key)}", detail)
        else:
            entries.append(entry)
    report.seen += len(groups)
    return entries, report


def _crc32_range(handle: int, offset: int, length: int) -> int:
    crc, end = 0, offset + length
    while offset < end:
        data = os.pread(handle, min(1 << 20, end - offset), offset)
        if not data:
            break
        crc, offset = zlib.crc32(data, crc), offset + len(data)
    return crc
