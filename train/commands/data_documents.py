"""``interloom data obelics`` and ``interloom data plan``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..messages import show

if TYPE_CHECKING:
    from ..data.shards.reader import ShardSet


def obelics(
    source: Annotated[
        str, typer.Argument(help="Parquet or JSON lines, a folder of them, a saved or hub data set")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards")],
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json")],
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
    filters: Annotated[bool, typer.Option(help="Apply the published filters")] = True,
    min_side: Annotated[int, typer.Option(help="Pixels of an image's shorter side")] = 150,
    max_image_side: Annotated[int, typer.Option(help="Pixels of an image's longer side")] = 20_000,
    max_aspect: Annotated[float, typer.Option(help="Longer side over shorter")] = 2.0,
    min_images: Annotated[int, typer.Option(help="Images of a document")] = 1,
    max_images: Annotated[int, typer.Option(help="Images of a document")] = 30,
    min_words: Annotated[int, typer.Option(help="Words of a document")] = 10,
    max_words: Annotated[int, typer.Option(help="Words of a document")] = 2_000,
) -> None:
    """Turn OBELICS records into shards of tokenised documents. Started again, it goes on where it stopped."""
    from ..data.documents.build import convert
    from ..data.documents.options import ConvertOptions
    from ..data.documents.records import Filters
    from ..data.download import FetchPolicy
    from ..messages import console as new_console
    from .progress_bar import progress_bar

    chosen = Filters(min_side, max_image_side, max_aspect, min_images, max_images, min_words, max_words)
    options = ConvertOptions(
        tokenizer=tokenizer,
        filters=chosen if filters else Filters.none(),
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
            source, out, options, workers=workers or os.cpu_count() or 1, engine=engine, progress=progress
        )
    console = new_console(stderr=True)
    stored = json.loads((out / "manifest.json").read_text())["shards"]
    console.print(
        f"{sum(s['samples'] for s in stored):,} documents with {sum(s['images'] for s in stored):,} images and "
        f"{sum(s['tokens'] for s in stored):,} tokens in {len(stored)} shards, from {report.seen:,} records"
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
