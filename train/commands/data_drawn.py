"""``interloom data demo`` and ``interloom data clipart``: drawn data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data.drawn.clipart import write_clipart
from ..data.drawn.pairs import write_demo
from ..messages import show


def demo(
    out: Annotated[Path, typer.Option(help="folder to write")],
    kind: Annotated[
        str, typer.Option(help="pairs (drawn scenes and captions) or interleaved (documents)")
    ] = "pairs",
    train: Annotated[int, typer.Option(help="training samples")] = 8192,
    val: Annotated[int, typer.Option(help="held-out samples")] = 300,
    seed: Annotated[int, typer.Option(help="another seed draws other samples")] = 0,
) -> None:
    """Draw a small data set that needs no download."""
    if kind == "pairs":
        write_demo(out, train=train, val=val, seed=seed)
    elif kind == "interleaved":
        from ..data.drawn.documents import write_demo as write_documents

        write_documents(out, train=train, val=val, seed=seed)
    else:
        raise ValueError(f"--kind {kind} given, expected pairs or interleaved")
    show(f"{out}: {train} training and {val} held-out samples")


def clipart(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    source: Annotated[
        Path, typer.Option(help="folder of transparent PNGs in folders (Debian: openclipart-png)")
    ] = Path("/usr/share/openclipart/png"),
    collages: Annotated[int, typer.Option(help="collages of held-out drawings")] = 200,
    seed: Annotated[int, typer.Option(help="of the collages")] = 0,
    workers: Annotated[int, typer.Option(help="processes")] = 2,
) -> None:
    """Build pairs from clip art, and collages with masks from what was held out."""
    from .progress_bar import progress_bar

    with progress_bar("building", "pairs") as update:
        count = write_clipart(out, source, collages=collages, seed=seed, workers=workers, progress=update)
    show(f"{out}: {count['train']} pairs, {count['val']} held out, {count['collages']} collages")
