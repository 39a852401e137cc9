"""Building shards of pairs from a source, and indexes for tars that exist.

Shard k holds the usable pairs of rows ``[k * n, (k + 1) * n)``: shards are independent, so processes build
them side by side, a killed build loses at most the shards it was in, and running it again does only those.
Every row that does not become a sample is counted and named in its shard's index and in ``report.json``.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ...files import sweep, writing
from ...parallel.processes import end_with_parent
from ..decode import MAX_PIXELS, Picture
from ..names import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, JSON_EXTENSIONS, is_image, is_litter
from ..order import mix_array
from ..report import BadSample, SkipRateError, SkipReport
from ..shards.index import Entry, ShardIndex, file_sha256, index_path, write_index
from ..shards.reader import Record
from ..shards.scan import COMPRESSED_SUFFIXES, refuse_compressed, scan_tar
from ..shards.writer import ShardFile, write_if_changed, write_manifest
from ..text import mend_text
from .captions import clean_captions, read_captions
from .nouns import NounFinder, noun_finder, nouns_from_value, unique
from .pair_source import PairSource, RawPair, Rows

REPORT = "report.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BuildOptions:
    """What a build depends on besides its source.

    Attributes:
        samples_per_shard: rows that go into one shard.
        nouns: None, ``column``, ``wordlist`` or ``nltk``; ``words`` is the list's file.
        max_side: images with a longer side are scaled down to it and encoded anew; None stores them as is.
        max_pixels: larger images are refused.
    """

    samples_per_shard: int = 5000
    nouns: str | None = None
    words: str | None = None
    max_side: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard} given, expected at least 1")
        if self.max_side is not None and self.max_side < 16:
            raise ValueError(f"--max-side {self.max_side} given, expected at least 16 pixels")


def build_shards(
    source: PairSource,
    out: str | Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    max_skip_rate: float = 0.1,
    progress: Progress = lambda done, total: None,
) -> SkipReport:
    """Build the shards of a source that ``out`` does not hold yet.

    Args:
        workers: processes; 1 builds in this one.
        max_skip_rate: share of rows that may be lost before the build stops.
        progress: called with (rows done, rows in all).

    Returns:
        the report over all shards, also those of earlier runs.

    Raises:
        ValueError: ``out`` holds shards of another source or options.
        SkipRateError: too many rows lost, now or when the shards there were built, or all; what is built stays.
    """
    out = Path(out)
    noun_finder(options.nouns, options.words)  # complain before the first process starts
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    rows, step = len(source), options.samples_per_shard
    build = sha256(json.dumps([source.digest(), asdict(options), rows]).encode()).hexdigest()
    jobs = [(out / f"{i:06d}.tar", i * step, min(rows, (i + 1) * step)) for i in range(-(-rows // step))]
    _refuse_other_build(out, {path.name for path, _, _ in jobs}, build)
    if not rows:
        raise ValueError("the source holds no rows, expected a pair a row")
    running, done, missing = SkipReport(), 0, []
    for path, start, stop in jobs:
        if os.path.exists(index_path(path)) and path.exists():
            running.merge(ShardIndex(index_path(path)).header["report"])
            done += stop - start
        else:
            missing.append((path, start, stop))
    progress(done, rows)
    for part, count in _run(_ShardJob(source, options, build), missing, workers):
        running.merge(part)
        done += count
        progress(done, rows)
        running.check(max_skip_rate, min(1000, rows))
    # Processes end in any order, the report names losses in that of the rows.
    report = SkipReport()
    for path, _, _ in jobs:
        report.merge(ShardIndex(index_path(path)).header["report"])
    report.merge({**source.unused.to_dict(), "seen": 0})
    report.check(max_skip_rate, 1)
    _require_some(report.seen - report.skipped, report, "rows", "pair")
    write_manifest(out)
    write_if_changed(out / REPORT, report.to_json())
    return report


def _require_some(kept: int, report: SkipReport, what: str, made: str) -> None:
    """Stop where nothing came of it: an empty result is a failure, whatever share of loss is allowed.

    Raises:
        SkipRateError: ``kept`` is zero.
    """
    if kept < 1:
        lines = "; ".join(report.lines()) or "nothing that looks like one"
        raise SkipRateError(
            f"none of {report.seen} {what} became a {made} ({lines}); nothing can be trained on that"
        )


def hold_out(source: PairSource, share: float) -> tuple[PairSource, PairSource]:
    """Split a source into training and validation rows, all rows of a picture on one side.

    Which side depends on the number of the picture's first row alone.

    Raises:
        ValueError: a share that leaves one side empty.
    """
    first: dict[Hashable, int] = {}
    rows = [first.setdefault(picture, row) for row, picture in enumerate(source.pictures_of_rows())]
    draws = mix_array(0x401D, np.asarray(rows, dtype=np.int64)) >> np.uint64(11)
    held = draws.astype(np.float64) / (1 << 53) < share
    train, val = np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
    if not train or not val:
        raise ValueError(
            f"--holdout {share:g} of {len(source)} rows with {len(first)} pictures leaves one side empty, "
            "expected 0 < share < 1"
        )
    return Rows(source, train, "train"), Rows(source, val, "val")


def _refuse_other_build(out: Path, expected: set[str], build: str) -> None:
    for index in sorted(out.glob("*.idx")):
        header = ShardIndex(index).header
        if header["shard"] not in expected or header["metadata"].get("build") != build:
            raise ValueError(
                f"{out} holds shards of another source or other options ({header['shard']}), expected an "
                "empty folder or one of the same build; choose another folder or delete it"
            )


class _ShardJob:
    """Builds one shard; sent to the processes once."""

    def __init__(self, source: PairSource, options: BuildOptions, build: str) -> None:
        self.source, self.options, self.build = source, options, build
        self.finder: Any = None

    def __call__(self, job: tuple[Path, int, int]) -> tuple[dict[str, Any], int]:
        path, start, stop = job
        if self.finder is None:
            self.finder = noun_finder(self.options.nouns, self.options.words)
        with ShardFile(path, kind="pairs", metadata={"build": self.build, "rows": [start, stop]}) as shard:
            for row, pair in enumerate(self.source.rows(start, stop), start):
                shard.report.seen += 1
                try:
                    if isinstance(pair, BadSample):
                        raise pair
                    shard.add(f"{row:09d}", self._members(pair, shard.report))
                except BadSample as bad:
                    shard.report.add_bad(bad)
            report = shard.report
        return report.to_dict(), stop - start

    def _members(self, pair: RawPair, report: SkipReport) -> dict[str, bytes]:
        captions = clean_captions(list(pair.captions), pair.name, report)
        if not captions:
            raise BadSample("empty caption", pair.name)
        extension, image = self._image(pair)
        found = _nouns(self.finder, captions) if self.finder is not None else None
        if found is None:
            found = nouns_from_value(pair.nouns) if self.options.nouns == "column" else []
        described: dict[str, Any] = {"nouns": found, "source": mend_text(pair.name)[0]}
        if len(captions) > 1:
            described["captions"] = captions
        return {
            extension: image,
            "txt": captions[0].encode(),
            "json": json.dumps(described, ensure_ascii=False).encode("utf-8", "replace"),
        }

    def _image(self, pair: RawPair) -> tuple[str, bytes]:
        picture = Picture(pair.image, pair.name, self.options.max_pixels)
        return picture.stored(self.options.max_side)


def _nouns(finder: NounFinder, captions: list[str]) -> list[str]:
    return unique(noun for caption in captions for noun in finder(caption))


_job: Any = None


def _set_job(job: Any) -> None:
    global _job
    end_with_parent()
    _job = job


def _call_job(argument: Any) -> Any:
    return _job(argument)


def _run(job: Any, arguments: list[Any], workers: int) -> Iterator[Any]:
    """Results of ``job`` for every argument as they are ready, from ``workers`` processes."""
    if workers <= 1 or len(arguments) <= 1:
        yield from map(job, arguments)
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_set_job, initargs=(job,)) as pool:
        futures = [pool.submit(_call_job, argument) for argument in arguments]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def index_shards(
    root: str | Path,
    *,
    nouns: str | None = None,
    words: str | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> SkipReport:
    """Write the indexes of the tars in a folder, beside them; the tars stay untouched.

    Indexes that exist, fit their tar's size and were made with the same options are kept.

    Args:
        nouns: ``wordlist`` (of the file ``words``) or ``nltk`` keeps the captions' nouns in the index;
            None leaves them to the samples' ``json``.

    Raises:
        FileNotFoundError: no tar there.
        ValueError: a compressed tar, or nouns that cannot be found.
    """
    noun_finder(nouns, words)
    root = Path(root)
    if root.is_dir():
        sweep(root)
    tars = _plain_tars(root)
    # The number rises with the rules by which members are read: indexes by older ones are made anew.
    options = {"nouns": [nouns, file_sha256(words) if nouns == "wordlist" and words else None], "rules": 2}
    parts: dict[str, dict[str, Any]] = {}
    missing = []
    for tar in tars:
        header: dict[str, Any] = {"bytes": -1}
        with suppress(FileNotFoundError, ValueError):
            header = ShardIndex(index_path(tar)).header
        # A shard that was built here has more to its index than a scan would find.
        ours = header["bytes"] == tar.stat().st_size and "build" in header["metadata"] and nouns is None
        if ours or (header["bytes"] == tar.stat().st_size and header["metadata"] == options):
            parts[str(tar)] = header["report"]
        else:
            missing.append(str(tar))
    progress(len(parts), len(tars))
    for name, part in _run(_IndexJob(nouns, words, options), missing, workers):
        parts[name] = part
        progress(len(parts), len(tars))
    report = SkipReport()
    for tar in tars:
        report.merge(parts[str(tar)])
    kept = sum(len(ShardIndex(index_path(tar))) for tar in tars)
    _require_some(kept, report, "samples", "pair: an image and a caption of one name, side by side")
    if root.is_dir():
        write_manifest(root)
    report.kept = kept
    return report


def _plain_tars(root: Path) -> list[Path]:
    """The tars to index: a file, or those of a folder.

    Raises:
        FileNotFoundError: none there.
        ValueError: a compressed one.
    """
    if not root.is_dir():
        if not root.exists():
            raise FileNotFoundError(f"no .tar at {root}, expected a WebDataset tar or a folder of them")
        if not root.is_file():
            raise ValueError(f"{root} is no file, expected a WebDataset tar or a folder of them")
        refuse_compressed(root)
        if root.suffix != ".tar":
            raise ValueError(f"{root} given, expected a file that ends in .tar or a folder of them")
        return [root]
    names = sorted(path for path in root.iterdir() if not is_litter(path.name))
    tars = [path for path in names if path.name.endswith(".tar")]
    for path in names:
        suffix = next((suffix for suffix in COMPRESSED_SUFFIXES if path.name.lower().endswith(suffix)), None)
        # Beside the tar that was unpacked from it, it is no loss.
        if suffix and path.is_file() and path.with_name(path.name[: -len(suffix)] + ".tar") not in tars:
            refuse_compressed(path)
    if not tars:
        raise FileNotFoundError(f"no .tar in {root}, expected a folder of WebDataset tars")
    for path in tars:
        if not path.is_file():
            raise ValueError(f"{path} is no file (a folder, a pipe or a broken link), expected a tar")
        refuse_compressed(path)
    return tars


class _IndexJob:
    """Indexes one tar of pairs and returns the report; sent to the processes once."""

    def __init__(self, nouns: str | None, words: str | None, options: dict[str, Any]) -> None:
        self.nouns, self.words, self.options = nouns, words, options
        self.finder: Any = None

    def __call__(self, tar: str) -> tuple[str, dict[str, Any]]:
        if self.finder is None:
            self.finder = noun_finder(self.nouns, self.words)
        images, texts = frozenset(IMAGE_EXTENSIONS), frozenset({*CAPTION_EXTENSIONS, *JSON_EXTENSIONS})
        entries, report = scan_tar(tar, requires=(images, texts))
        kept, found = [], []
        with open(tar, "rb") as file:
            for entry in entries:
                try:
                    captions = read_captions(_texts(file.fileno(), entry, Path(tar).name), report)
                except BadSample as bad:
                    report.add_bad(bad)
                    continue
                kept.append(entry)
                found.append(json.dumps(_nouns(self.finder, captions) if self.finder else []).encode())
        attached = None
        if self.finder is not None:
            ends = np.cumsum([len(text) for text in found], dtype=np.uint32)
            attached = {"nouns": np.frombuffer(b"".join(found), np.uint8), "nouns_end": ends}
        try:
            write_index(
                tar,
                kept,
                size=os.path.getsize(tar),
                sha256=file_sha256(tar),
                report=report,
                metadata=self.options,
                ragged=attached,
            )
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            folder = Path(tar).parent
            raise ValueError(
                f"the index of {tar} belongs beside it, and {folder} cannot be written ({error.strerror}); make a "
                f"folder of links, `mkdir DIR && ln -s {folder.resolve()}/*.tar DIR`, and index DIR"
            ) from None
        return tar, report.to_dict()


def _texts(handle: int, entry: Entry, shard: str) -> Record:
    """A sample's texts in a tar."""
    texts = {
        m.extension: memoryview(os.pread(handle, m.length, m.offset))
        for m in entry.members
        if not is_image(m.extension)
    }
    return Record(entry.key, shard, 0, texts)
