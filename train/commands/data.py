"""``interloom data``: build, check and draw data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..messages import show
from .data_documents import documents, obelics, plan
from .data_drawn import clipart, demo
from .data_stats import stats
from .data_tokenizer import tokenizer
from .progress_bar import progress_bar

if TYPE_CHECKING:
    from ..data.report import SkipReport

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Build shards, fetch images, check integrity."
)


@app.command()
def pairs(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images, CSV, TSV, JSON lines, Parquet, saved data set, hub id, or tars."
        ),
    ],
    out: Annotated[str | None, typer.Argument(help="Folder for the shards (not with --index-only).")] = None,
    index_only: Annotated[bool, typer.Option(help="Index the WebDataset tars in SOURCE, in place.")] = False,
    captions: Annotated[
        str, typer.Option(help="Of a folder: metadata (a table in it), sidecar (.txt, .json), names or auto.")
    ] = "auto",
    image_column: Annotated[str | None, typer.Option(help="Column with image bytes or paths.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with captions.")] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Folder that a table's paths start from; the table's own otherwise.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option(help="Read what links of the folder lead to elsewhere.")
    ] = False,
    encoding: Annotated[
        str | None, typer.Option(help="Of a text table that is neither UTF-8 nor UTF-16, such as cp1252.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Of a text table's cells, such as ';' or tab, where it is not found.")
    ] = None,
    nouns: Annotated[
        str | None, typer.Option(help="Where nouns come from: column, wordlist or nltk.")
    ] = None,
    nouns_column: Annotated[str, typer.Option(help="Column with nouns, for --nouns column.")] = "nouns",
    words: Annotated[str | None, typer.Option(help="File with a word a line, for --nouns wordlist.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    holdout: Annotated[
        float, typer.Option(help="Share of pictures for OUT/val; the rest goes to OUT/train.")
    ] = 0.0,
    max_side: Annotated[
        int | None, typer.Option(help="Scale larger images down to this many pixels.")
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Larger images are refused undecoded.")] = 64_000_000,
    samples_per_shard: Annotated[int, typer.Option(help="Rows a shard.")] = 5000,
    max_skip_rate: Annotated[
        float, typer.Option(help="Share of rows that may be lost before it stops.")
    ] = 0.1,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Build shards of image-caption pairs, or index those there are. Started again, it goes on."""
    from pathlib import Path

    from ..data.pairs.build import BuildOptions, build_shards, hold_out, index_shards
    from ..data.pairs.sources import Columns, open_source

    if index_only:
        if out is not None and Path(out).resolve() != Path(source).resolve():
            raise ValueError(f"--index-only works in place, OUT is {out}; leave OUT away")
        kind = None if nouns == "column" else nouns  # the column of a tar is its json
        with progress_bar("indexing", "tars") as update:
            report = index_shards(source, nouns=kind, words=words, workers=workers, progress=update)
        _finish(report, f"{report.kept} pairs of {report.seen} samples in the tars of {source}")
        return
    if out is None:
        raise ValueError("OUT is missing, expected the folder for the shards (or --index-only)")
    columns = Columns(image_column, caption_column, nouns_column if nouns == "column" else None)
    everything = open_source(
        source,
        captions=captions,
        columns=columns,
        split=split,
        image_root=image_root,
        follow_links=follow_links,
        encoding=encoding,
        separator=separator,
    )
    options = BuildOptions(samples_per_shard, nouns, words, max_side, max_pixels)
    parts = [(everything, Path(out))]
    if holdout:
        train, val = hold_out(everything, holdout)
        parts = [(train, Path(out) / "train"), (val, Path(out) / "val")]
    for part, folder in parts:
        with progress_bar(f"building {folder}", "pairs") as update:
            report = build_shards(
                part, folder, options, workers=workers, max_skip_rate=max_skip_rate, progress=update
            )
        _finish(report, f"{report.seen - report.skipped} pairs of {report.seen} rows in {folder}")


def _finish(report: SkipReport, summary: str) -> None:
    for line in report.lines(5, lost=True):
        show(f"left out: {line}")
    for line in report.lines(5, lost=False):
        show(f"noted: {line}")
    show(summary)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Folder with shards, searched recursively.")],
    decode_samples: Annotated[int, typer.Option(help="Samples a shard to decode in full.")] = 16,
) -> None:
    """Check shards against their indexes. Exit code 0 when whole; 1, with a list, when not."""
    from ..data.shards.verify import verify_folder

    with progress_bar("verifying", "shards") as update:
        problems = verify_folder(folder, decode_samples=decode_samples, progress=update)
    for problem in problems:
        show(problem)
    show(f"{folder} is whole" if not problems else f"{len(problems)} problems in {folder}")
    raise typer.Exit(1 if problems else 0)


for command in (demo, clipart, documents, obelics, plan, stats, tokenizer):
    app.command()(command)
