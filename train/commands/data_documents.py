"""``interloom data documents``, its alias ``data obelics``, and ``interloom data plan``."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..messages import show

if TYPE_CHECKING:
    from ..data.shards.reader import ShardSet


def documents(
    source: Annotated[
        str,
        typer.Argument(
            help="Parquet, JSON lines, JSON, tars, tables, a folder of them, a saved or hub data set"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards")],
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json")],
    format: Annotated[
        str, typer.Option(help="auto, obelics, mmc4, pairs, llava, messages, webdataset or text")
    ] = "auto",
    workers: Annotated[int, typer.Option(help="Processes; 0 takes one a core")] = 0,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster")] = "local",
    records_per_shard: Annotated[int, typer.Option(help="Records of the source in one shard")] = 4096,
    image_root: Annotated[str | None, typer.Option(help="Folder that image paths start from")] = None,
    max_side: Annotated[int | None, typer.Option(help="Scale larger images down to this many pixels")] = None,
    fetch: Annotated[bool, typer.Option(help="Download images that are only addresses")] = False,
    fetch_cache: Annotated[str | None, typer.Option(help="Folder that keeps downloads")] = None,
    fetch_deadline: Annotated[float, typer.Option(help="Seconds for one image, retries included")] = 30.0,
    fetch_per_host: Annotated[int, typer.Option(help="Downloads at once from one host")] = 4,
    fetch_allow_host: Annotated[
        list[str] | None, typer.Option(help="host[:port] that may be a private address")
    ] = None,
    filters: Annotated[
        bool | None,
        typer.Option(
            "--filters/--no-filters", help="The published filters", show_default="of web pages: obelics, mmc4"
        ),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(help="Pixels of an image's shorter side", show_default="150 with filters")
    ] = None,
    max_image_side: Annotated[
        int | None, typer.Option(help="Pixels of an image's longer side", show_default="20000 with filters")
    ] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="Longer side over shorter", show_default="2 with filters")
    ] = None,
    min_images: Annotated[
        int | None, typer.Option(help="Images of a document", show_default="1 with filters")
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Images of a document", show_default="30 with filters")
    ] = None,
    min_words: Annotated[
        int | None, typer.Option(help="Words of a document", show_default="10 with filters")
    ] = None,
    max_words: Annotated[
        int | None, typer.Option(help="Words of a document", show_default="2000 with filters")
    ] = None,
) -> None:
    """Turn records of any format into shards of tokenised documents. Started again, it goes on where it stopped."""
    from ..data.documents.build import convert
    from ..data.documents.options import ConvertOptions
    from ..data.documents.recognise import choose_format
    from ..data.documents.records import Filters
    from ..data.documents.tokenization import DocumentTokenizer
    from ..data.download import FetchPolicy
    from ..messages import console as new_console
    from .progress_bar import progress_bar

    DocumentTokenizer(tokenizer)  # a wrong one is found before a data set is downloaded to look into it
    made = choose_format(format, source)
    chosen = Filters() if filters or (filters is None and made.pages) else Filters.none()
    limits = (min_side, max_image_side, max_aspect, min_images, max_images, min_words, max_words)
    if filters is not False:
        for field, limit in zip(fields(Filters), limits, strict=True):
            if limit is not None:
                setattr(chosen, field.name, limit)
    options = ConvertOptions(
        tokenizer=tokenizer,
        filters=chosen,
        records_per_shard=records_per_shard,
        image_root=image_root,
        max_side=max_side,
        fetch=fetch,
        fetch_cache=fetch_cache,
        fetch_policy=FetchPolicy(
            deadline=fetch_deadline,
            per_host=fetch_per_host,
            allow_hosts=frozenset(fetch_allow_host or ()),
        ),
    )
    with progress_bar("converting", "shards") as progress:
        report = convert(
            source,
            out,
            options,
            workers=workers or os.cpu_count() or 1,
            engine=engine,
            progress=progress,
            format=made.name,
        )
    console = new_console(stderr=True)
    stored = json.loads((out / "manifest.json").read_text())["shards"]
    console.print(
        f"{sum(s['samples'] for s in stored):,} documents with {sum(s['images'] for s in stored):,} images and "
        f"{sum(s['tokens'] for s in stored):,} tokens in {len(stored)} shards, from {report.seen:,} records "
        f"({made.name})"
    )
    for lost, what in ((True, "left out"), (False, "noted")):
        for line in report.lines(names=2, lost=lost):
            console.print(f"  {what}: {line}", markup=False)
    if not stored:
        raise ValueError(
            f"no document of {source} was stored; the lines above say why. Give --image-root or --fetch if the "
            "images are paths or addresses, --no-filters to keep short documents and small images"
        )
    if any(reason.startswith("image: ") for reason in report.counts) and not any(s["images"] for s in stored):
        raise ValueError(
            f"not one image of {source} could be read; the lines above say why. Give the right --image-root, or "
            "--fetch if the images are addresses, and another folder for the shards"
        )


def obelics(**options: Any) -> None:
    """Turn OBELICS records into shards of tokenised documents: ``documents --format obelics``."""
    documents(**options, format="obelics")


# The options of the command that it stands for, but the format.
_options = inspect.signature(documents, eval_str=True)
obelics.__signature__ = _options.replace(  # type: ignore[attr-defined]
    parameters=[parameter for name, parameter in _options.parameters.items() if name != "format"]
)


def plan(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Folders of shards; NAME=FOLDER names a source")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder of the tokenizer they were made with")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sequence")] = 1024,
    max_images: Annotated[int, typer.Option(help="Images of a sequence")] = 10,
    weights: Annotated[
        str | None, typer.Option(help="NAME=SHARE,… of tokens, or idefics for the published mixture")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order")] = 0,
    window: Annotated[int, typer.Option(help="Documents packed together")] = 8192,
    out: Annotated[Path | None, typer.Option(help="PNG of the first sequences")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to look at")] = 2048,
    simulate: Annotated[
        int, typer.Option(help="Measure a plan of this many invented documents instead (OBELICS: 141000000)")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON")] = False,
) -> None:
    """Show how documents pack into sequences, or what a plan costs at any scale."""
    from ..data.documents.order import DocumentsPlan, ShardDocuments
    from ..data.documents.order_picture import draw_plan, summarise
    from ..data.documents.simulate import SimulatedDocuments, measure

    if simulate:
        figures: dict = measure(simulate, max_tokens=max_tokens, max_images=max_images, seed=seed)
        if out is not None:
            shown = {"simulated": SimulatedDocuments(min(simulate, 50_000), seed=seed)}
            draw_plan(DocumentsPlan(shown, max_tokens=max_tokens, max_images=max_images, seed=seed), out)
    else:
        made = DocumentsPlan(
            {name: ShardDocuments(shards) for name, shards in _opened(sources).items()},
            weights=_shares(weights),
            max_tokens=max_tokens,
            max_images=max_images,
            window_documents=window,
            seed=seed,
            tokenizer="" if tokenizer is None else _digest(tokenizer),
        )
        figures = {"length": len(made), **summarise(made, min(sequences, len(made)))}
        if out is not None:
            draw_plan(made, out)
    if as_json:
        show(json.dumps(figures))
        return
    _print(figures)
    if out is not None:
        show(f"picture: {out}")


def _opened(sources: list[str] | None) -> dict[str, ShardSet]:
    """The shards of each source by its name; a folder without one is called after itself."""
    from ..data.shards.reader import ShardSet

    if not sources:
        raise ValueError("no folder of shards was given; name at least one, or use --simulate 141000000")
    named = {}
    for number, source in enumerate(sources):
        name, found, folder = source.partition("=")
        if not found:
            name, folder = Path(source).name or f"source{number}", source
        named[name] = ShardSet.open([folder], kind="documents")
    return named


def _shares(weights: str | None) -> dict[str, float] | None:
    """The share of tokens of each source, as ``--weights`` says."""
    from ..data.documents.order import IDEFICS_MIXTURE

    if weights is None:
        return None
    if weights == "idefics":
        return dict(IDEFICS_MIXTURE)
    try:
        return {name: float(share) for name, share in (part.split("=") for part in weights.split(","))}
    except ValueError:
        raise ValueError(f"--weights {weights} given, expected NAME=SHARE,NAME=SHARE or idefics") from None


def _digest(tokenizer: str) -> str:
    from ..data.documents.tokenization import DocumentTokenizer

    return DocumentTokenizer(tokenizer).sha256


def _print(figures: dict) -> None:
    from rich.table import Table

    from ..messages import console as new_console

    table = Table(show_header=False)
    for name, value in figures.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, float):
            text = f"{value:.1%}" if name == "fill" else f"{value:.3f}"
        else:
            text = f"{value:,}"
        table.add_row(name.replace("_", " "), text)
    new_console().print(table)
