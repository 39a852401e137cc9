"""``interloom data stats``: what a folder of shards holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..messages import console as new_console
from ..messages import show
from .progress_bar import progress_bar


def stats(
    folder: Annotated[str, typer.Argument(help="Folder of shards, of documents or of pairs")],
    out: Annotated[Path | None, typer.Option(help="Picture of it (PNG, SVG, PDF)")] = None,
    documents: Annotated[int, typer.Option(help="Look into this many at most; 0 for all")] = 100_000,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON")] = False,
) -> None:
    """Count documents, tokens, images, their sizes, scripts and duplicates."""
    from ..data.documents.statistics import draw_statistics, statistics

    with progress_bar("looking", "documents") as update:
        figures = statistics(folder, limit=documents, progress=update)
    if out is not None:
        draw_statistics(figures, out)
    if as_json:
        show(json.dumps(figures))
        return
    _print(figures)
    if out is not None:
        show(f"picture: {out}")


def _print(figures: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _told(name, value))
    new_console().print(table)


def _told(name: str, value: Any) -> str:
    if name == "scripts":
        return (
            ", ".join(f"{script.capitalize()} {share:.1%}" for script, share in list(value.items())[:8])
            or "none"
        )
    if isinstance(value, dict):
        shown = ((key, held) for key, held in value.items() if key != "histogram")
        return (
            ", ".join(
                f"{key} {held:,.1f}" if isinstance(held, float) else f"{key} {held:,}" for key, held in shown
            )
            or "none"
        )
    return f"{value:,}"
