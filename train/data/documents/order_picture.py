"""A plan as a picture: what the first sequences are made of, and how full they all are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ...files import open_atomically
from .order import DocumentsPlan


def summarise(plan: DocumentsPlan, sequences: int) -> dict[str, float | dict[int, int]]:
    """Fill, pieces and images of the first ``sequences`` of a plan."""
    tokens = pieces = images = 0
    histogram: Counter[int] = Counter()
    for row in plan.locate(np.arange(sequences)):
        found = [piece for *_, piece in plan.sequence(row)]
        tokens += sum(piece.length for piece in found)
        count = sum(piece.num_images for piece in found)
        pieces, images = pieces + len(found), images + count
        histogram[count] += 1
    return {
        "sequences": sequences,
        "fill": tokens / (sequences * plan.max_tokens),
        "documents_per_sequence": pieces / sequences,
        "images_per_sequence": images / sequences,
        "image_histogram": dict(sorted(histogram.items())),
    }


def draw_plan(plan: DocumentsPlan, path: str | Path, *, rows: int = 32, sequences: int = 512) -> None:
    """Write a PNG: the first ``rows`` sequences as coloured bars, one colour a document, images as marks.

    Below, how images are spread over the first ``sequences``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, sequences = min(rows, len(plan)), min(sequences, len(plan))
    figure = Figure(figsize=(11, 0.2 * rows + 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    packs, spread = figure.subplots(2, 1, height_ratios=[0.2 * rows + 1, 2.2])
    palette = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2", "#eeca3b", "#ff9da6"]
    marks: tuple[list[float], list[float]] = ([], [])
    for row, where in enumerate(plan.locate(np.arange(rows))):
        token = 0
        for number, (source, shard, sample, piece) in enumerate(plan.sequence(where)):
            colour = palette[number % len(palette)]
            # A piece that continues a document is drawn paler.
            packs.barh(
                row, piece.length, left=token, height=0.8, color=colour,
                alpha=0.55 if piece.start else 1.0, edgecolor="white", linewidth=0.8,
            )  # fmt: skip
            starts = plan.sources[plan.names[source]].lengths(shard)
            first = int(starts.offsets[sample]) + piece.first_image
            for position in starts.image_starts[first : first + piece.num_images]:
                marks[0].append(token + int(position) - piece.start)
                marks[1].append(row)
            token += piece.length
        if token < plan.max_tokens:
            packs.barh(row, plan.max_tokens - token, left=token, height=0.8, color="#e8e8e8")
    packs.scatter(*marks, marker="|", s=46, color="black", linewidths=1.4, label="image")
    packs.set(xlim=(0, plan.max_tokens), ylim=(rows - 0.4, -0.6), xlabel="token", ylabel="sequence")
    summary = summarise(plan, sequences)
    packs.set_title(
        f"First {rows} of {len(plan):,} sequences of {plan.max_tokens} tokens: a colour a document, paler "
        f"where it continues, grey padding. Fill {summary['fill']:.1%}",
        fontsize=9,
        loc="left",
    )
    packs.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    histogram = summary["image_histogram"]
    if isinstance(histogram, dict):
        spread.bar(list(histogram), list(histogram.values()), color="#4c78a8")
    spread.set(xlabel=f"images in a sequence (at most {plan.max_images})", ylabel=f"of {sequences} sequences")
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:] or "png")
