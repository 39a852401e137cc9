"""Records of any format to shards of tokenised documents: ``interloom data documents``.

Every chunk of the source becomes one shard, made by one worker from the first record to the published index::

    read ─> split ─> deduplicate ─> get images ─> filter ─> tokenise ─> tar + index + report

A shard exists when its index does, so a run that was stopped goes on with the chunks that have none; what a
chunk lost, and why, is kept beside the shards in ``reports/`` and summed up in ``report.json``. The options,
the tokenizer and the source are pinned in ``conversion.json``: other ones on the same folder are refused.

A stored document is ``KEY.json`` (``ids``, ``image_starts``, ``texts``, ``images``, ``general_metadata``) and
``KEY.0.jpg``, ``KEY.1.png`` … for its images; the index holds its tokens, images and image positions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...files import sweep, write_atomically
from ...parallel.processes import end_with_parent
from ..report import BadSample, SkipReport
from ..shards.index import index_path
from ..shards.writer import ShardFile, write_manifest
from .dialogues import DialogueWriter, Encoded
from .formats import FORMATS, Format
from .formats.llava import LLAVA
from .formats.messages import MESSAGES
from .formats.obelics import OBELICS
from .images import ImageLoader
from .options import ConvertOptions
from .other_files import tar_damage
from .recognise import choose_format, default_image_root
from .records import (
    Document,
    Filters,
    Picture,
    deduplicate,
    drop_missing,
    filter_document,
    split_document,
)
from .sources import Chunk, list_chunks, read_chunk
from .tokenization import DocumentTokenizer

_RAY_CLUSTER = "/tmp/ray/ray_current_cluster"  # where `ray start` says that a cluster runs here


def convert(
    source: str,
    out: str | Path,
    options: ConvertOptions,
    *,
    workers: int = 1,
    engine: str = "local",
    progress: Callable[[int, int], None] | None = None,
    format: str = OBELICS.name,
) -> SkipReport:
    """Convert ``source`` into shards in ``out``, going on where an earlier run stopped.

    Args:
        source: see :mod:`.sources`.
        out: folder; made if missing.
        options: what the shards shall hold.
        workers: processes (``engine="local"``) or concurrent tasks (``engine="ray"``).
        engine: ``local`` or ``ray``.
        progress: called with (chunks done, chunks in all).
        format: of the records, or ``auto``.

    Returns:
        The report of all chunks, ``seen`` being records read.

    Raises:
        ValueError: options that differ from those the folder was begun with, or an unknown engine.
        FileNotFoundError: no source or tokenizer.
    """
    out = Path(out)
    _check(options)
    tokenizer = DocumentTokenizer(options.tokenizer)  # a missing token is found before anything is written
    if engine not in ("local", "ray"):
        raise ValueError(f"engine {engine!r} given, expected local or ray")
    unused = SkipReport()
    made = choose_format(format, source)
    if options.image_root is None:
        options = replace(options, image_root=default_image_root(made, source))
    if options.filters is None:
        options = replace(options, filters=Filters() if made.pages else Filters.none())
    # A chat template that cannot be used is found before anything is written, too.
    template = DialogueWriter(tokenizer).digest if made in (LLAVA, MESSAGES) else None
    chunks = list_chunks(source, options.records_per_shard, unused, made)
    out.mkdir(parents=True, exist_ok=True)
    _pin(out, source, options, tokenizer, len(chunks), made, template)
    (out / "reports").mkdir(exist_ok=True)
    for folder in (out, out / "reports"):
        sweep(folder)
    waiting = [chunk for chunk in chunks if not _report_path(out, chunk).exists()]
    done = len(chunks) - len(waiting)
    if progress is not None:
        progress(done, len(chunks))
    run = {"local": _run_local, "ray": _run_ray}[engine]
    for _ in run(waiting, str(out), options, workers):
        done += 1
        if progress is not None:
            progress(done, len(chunks))
    report = unused
    for chunk in chunks:
        report.merge(json.loads(_report_path(out, chunk).read_text()))
    write_manifest(out)
    report.save(out / "report.json")
    return report


def convert_chunk(chunk: Chunk, out: str, options: ConvertOptions) -> dict[str, Any]:
    """Make one shard and its report; a chunk that leaves no document makes a report alone."""
    report = SkipReport()
    tokenizer = DocumentTokenizer(options.tokenizer)
    writer = _Writer(tokenizer, FORMATS[chunk.format].dialogues)
    shard = Path(out) / f"{chunk.number:06d}.tar"
    metadata = {"tokenizer": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    with ShardFile(shard, kind="documents", metadata=metadata) as file:
        with ImageLoader(options, report) as images:
            for document in images.located(_documents(chunk, report)):
                kept = filter_document(document, options.filters or Filters(), report)
                if kept is None:
                    continue
                # Only now are pixels decoded: what a filter drops costs no more than its header.
                kept = drop_missing(images.checked(kept))
                if kept.turns and len(kept.parts) < len(document.parts):
                    # Its answers speak of a picture that nobody would see.
                    report.add("dialogue that lost an image", kept.key)
                    continue
                if not kept.parts:
                    report.add("empty document", kept.key)
                    continue
                try:
                    _store(file, kept, writer, report)
                except BadSample as bad:
                    report.add_bad(bad)
                except (ValueError, RecursionError, MemoryError) as error:
                    report.add(
                        "document cannot be stored", kept.key, f"{type(error).__name__}: {error}"[:120]
                    )
        file.report.merge(report)
        empty = not file.entries
    if empty:
        shard.unlink()
        Path(index_path(shard)).unlink()
    write_atomically(_report_path(Path(out), chunk), json.dumps(report.to_dict()).encode())
    return report.to_dict()


def _documents(chunk: Chunk, report: SkipReport) -> Iterator[Document]:
    read = FORMATS[chunk.format].read
    if chunk.kind == "tar" and chunk.start == 0:
        report.merge(tar_damage(chunk.path))
    for key, record in read_chunk(chunk):
        report.seen += 1
        if isinstance(record, BadSample):
            report.add_bad(record)
            continue
        try:
            whole = read(record, key, report)
        except BadSample as bad:
            report.add_bad(bad)
            continue
        for document in split_document(whole):
            yield deduplicate(document, report)


def _store(file: ShardFile, document: Document, writer: _Writer, report: SkipReport) -> None:
    made = writer.encode(document, report)
    ids, starts = made.ids, made.starts
    pictures = document.pictures
    content = {
        "ids": ids,
        "image_starts": starts,
        "texts": [None if isinstance(part, Picture) else part for part in document.parts],
        "images": [{"src": p.src, "width": p.width, "height": p.height} for p in pictures],
        "general_metadata": document.general_metadata,
    }
    ragged = {"image_start": starts}
    if made.answers is not None:
        content["roles"] = [document.turns[place].role for place in document.places]
        content["answers"] = made.answers
        file.metadata["dialogues"] = file.metadata.get("dialogues", 0) + 1
    columns = {}
    if writer.dialogues:  # of every document of the shard, also of those that are none
        answers = made.answers or []
        columns["answers"] = len(answers)
        ragged |= {"answer_start": [start for start, _ in answers], "answer_end": [end for _, end in answers]}
    members = {"json": json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()}
    members |= {f"{number}.{p.extension}": p.data or b"" for number, p in enumerate(pictures)}
    file.add(document.key, members, tokens=len(ids), images=len(pictures), ragged=ragged, **columns)


class _Writer:
    """Documents to tokens: pages as they are, dialogues by the chat template.

    Args:
        dialogues: whether there may be any.
    """

    def __init__(self, tokenizer: DocumentTokenizer, dialogues: bool) -> None:
        self.tokenizer, self.dialogues = tokenizer, dialogues
        self._turns: DialogueWriter | None = None

    @property
    def turns(self) -> DialogueWriter:
        """Made when the first dialogue comes: tokenizers of pages need no chat template."""
        self._turns = self._turns or DialogueWriter(self.tokenizer)
        return self._turns

    def encode(self, document: Document, report: SkipReport) -> Encoded:
        """Tokens of a document."""
        if document.turns:
            return self.turns.encode(document, report)
        return Encoded(*self.tokenizer.encode(document, report))


def _check(options: ConvertOptions) -> None:
    """Refuse numbers that no shard can be made with."""
    if options.records_per_shard < 1:
        raise ValueError(f"--records-per-shard {options.records_per_shard} given, expected at least 1")
    if options.max_side is not None and options.max_side < 16:
        raise ValueError(f"--max-side {options.max_side} given, expected at least 16 pixels")


def _report_path(out: Path, chunk: Chunk) -> Path:
    return out / "reports" / f"{chunk.number:06d}.json"


def _pin(
    out: Path,
    source: str,
    options: ConvertOptions,
    tokenizer: DocumentTokenizer,
    chunks: int,
    made: Format,
    template: str | None,
) -> None:
    """Refuse to mix two conversions in one folder."""
    wanted = {
        "source": os.path.abspath(source) if os.path.exists(source) else source,
        "chunks": chunks,
        "tokenizer": tokenizer.sha256,
        "filters": asdict(options.filters or Filters()),
        "format": made.name,
        "chat_template": template,
        "records_per_shard": options.records_per_shard,
        "max_side": options.max_side,
        "fetch": options.fetch,
        "image_root": options.image_root and os.path.abspath(options.image_root),
    }
    path = out / "conversion.json"
    if path.exists():
        begun = json.loads(path.read_text())
        # Earlier releases did not say these.
        begun.setdefault("image_root", wanted["image_root"])
        begun.setdefault("format", OBELICS.name)
        begun.setdefault("chat_template", None)
        changed = [name for name in wanted if begun.get(name) != wanted[name]]
        if changed:
            raise ValueError(
                f"{out} was begun with other options ({', '.join(changed)} changed); use them again to "
                "go on, or give an empty folder"
            )
        return
    if any(out.glob("*.tar")):
        raise ValueError(f"{out} already holds shards of something else; give an empty folder")
    write_atomically(path, (json.dumps(wanted, indent=1) + "\n").encode())


def _run_local(
    chunks: list[Chunk], out: str, options: ConvertOptions, workers: int
) -> Iterator[dict[str, Any]]:
    if workers <= 1 or len(chunks) <= 1:
        for chunk in chunks:
            yield convert_chunk(chunk, out, options)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    # The fetcher's limit for one host holds for the machine, not for each process.
    policy = replace(
        options.fetch_policy,
        per_host=max(1, options.fetch_policy.per_host // workers),
        concurrency=max(1, options.fetch_policy.concurrency // workers),
    )
    options = replace(options, fetch_policy=policy)
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        futures = [pool.submit(convert_chunk, chunk, out, options) for chunk in chunks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_ray(
    chunks: list[Chunk], out: str, options: ConvertOptions, workers: int
) -> Iterator[dict[str, Any]]:
    """The same work on a Ray cluster; ``out`` must be a folder that every node sees."""
    local = "RAY_ADDRESS" not in os.environ and not os.path.exists(_RAY_CLUSTER)
    if local:
        # Without a cluster Ray listens on every interface; told that clusters are not wanted, on loopback alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--engine ray needs Ray; install it with: pip install 'interloom[ray]'") from None
    if not chunks:
        return
    if local and not ray.is_initialized():
        ray.init(include_dashboard=False)
    data = ray.data.from_items([asdict(chunk) for chunk in chunks], override_num_blocks=len(chunks))
    results = data.map(
        lambda row: {"report": json.dumps(convert_chunk(Chunk(**row), out, options))},
        concurrency=max(1, workers),
    )
    for row in results.iter_rows():
        yield json.loads(row["report"])
