"""``interloom bench data``: samples a second, beside what people use otherwise, in one run.

Both sides read the same shards of 512-px JPEGs with the same number of worker processes and end with the same
tensors in the trainer's process. What counts is the median of the rounds' ratios (:mod:`.contest`).

Pairs: the usual ``webdataset`` pipeline, ``decode("pil")``, bilinear resize, to float tensor, batched in a
``DataLoader``; against ``pairs_loader`` of ``data.pairs.dataset`` with shuffling, checksums and normalisation, scaling
bicubically. Documents: see :mod:`.documents`.
"""

from __future__ import annotations

import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...kernels.bench.contest import environment_line, in_turn, say
from ..messages import show
from .contest import ratio_of_rounds

# What one side of a comparison is: call it, iterate, count.
Side = Callable[[], Iterator[int]]


def data(
    kind: Annotated[str, typer.Option(help="pairs, documents or all.")] = "all",
    samples: Annotated[int, typer.Option(help="Pairs (documents: sequences) read a round.")] = 1000,
    workers: Annotated[int, typer.Option(help="Worker processes of each side.")] = 2,
    size: Annotated[int, typer.Option(help="Side of the images that come out.")] = 224,
    source_size: Annotated[int, typer.Option(help="Side of the JPEGs that are read.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; each side runs once in each.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time data reading beside webdataset (pairs) and Transformers' IdeficsProcessor (documents)."""
    if kind not in ("pairs", "documents", "all"):
        raise ValueError(f"--kind {kind} given, expected pairs, documents or all")
    if min(samples, batch_size, rounds, size, source_size) < 1 or workers < 0:
        raise ValueError("a size or count below 1 given, expected positive ones (workers: 0 or more)")
    say(environment_line())
    results = []
    if kind in ("pairs", "all"):
        results.append(bench_pairs(samples, workers, size, source_size, batch_size, rounds))
    if kind in ("documents", "all"):
        results.append(
            bench_documents(max(16, samples // 5), workers, size, source_size, batch_size // 4, rounds)
        )
    if as_json:
        show(json.dumps(results, indent=1))
    else:
        _print_table(results)


def bench_pairs(
    samples: int, workers: int, size: int, source_size: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Samples a second of both pipelines on the same shards."""
    with _photo_shards(samples, source_size) as folder:
        return compare(
            f"pairs, {source_size} px JPEG to {size} px, {workers} workers",
            {
                "interloom": lambda: _interloom_pairs(folder, workers, size, batch_size),
                "webdataset": lambda: _webdataset_pairs(folder, workers, size, batch_size),
            },
            rounds,
        )


def bench_documents(
    documents: int, workers: int, size: int, source_size: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Documents a second of our loader and of Transformers' processor in a ``DataLoader``."""
    from .documents import IMAGES, document_shards, documents_sides, image_backend

    with document_shards(documents, photos(50, source_size)) as folder:
        return compare(
            f"documents of {IMAGES} images, {source_size} px JPEG to {size} px, {workers} workers, "
            f"{image_backend()}",
            documents_sides(folder, workers, size, max(1, batch_size)),
            rounds,
        )


def compare(title: str, sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Run the sides in turn and take medians.

    Args:
        title: names the comparison.
        sides: ours first; each yields the number of samples of every batch.
        rounds: turns of each; one more comes first, uncounted, for it imports libraries.

    Returns:
        ``title``, ``samples_per_second`` {side: median}, ``ratio`` (median of ours over theirs by round), ``ratios``
        of all rounds and their ``spread`` in words.
    """
    speeds = in_turn({name: partial(_speed, side) for name, side in sides.items()}, rounds, warm_up=1)
    ours, theirs = list(speeds.values())[:2]
    ratio = ratio_of_rounds(ours, theirs)
    return {
        "title": title,
        "samples_per_second": {name: round(statistics.median(all_), 1) for name, all_ in speeds.items()},
        "ratio": round(ratio.median, 2),
        "ratios": [round(a / b, 2) for a, b in zip(ours, theirs, strict=True)],
        "spread": str(ratio),
    }


def _speed(side: Side) -> float:
    """Samples a second of one pass over what a side yields."""
    gc.collect()
    start = time.perf_counter()
    count = sum(side())
    return count / (time.perf_counter() - start)


def photos(count: int, side: int) -> list[bytes]:
    """JPEGs whose detail and size resemble photographs' (about 70 kB at 512 px)."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        pixels = np.zeros((side, side, 3), np.float32)
        for cells, strength in ((4, 70), (16, 35), (64, 20), (side // 2, 10)):
            noise = generator.normal(0, strength, (cells, cells, 3)).astype(np.float32)
            layers = [
                Image.fromarray(noise[..., c]).resize((side, side), Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            pixels += np.stack([np.asarray(layer) for layer in layers], -1)
        data = io.BytesIO()
        Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
        images.append(data.getvalue())
    return images


@contextmanager
def _photo_shards(samples: int, side: int) -> Iterator[str]:
    """A folder with shards of photos."""
    from ..data.shards.writer import ShardWriter

    images = photos(min(samples, 50), side)
    with tempfile.TemporaryDirectory(prefix="interloom-bench-") as folder:
        with ShardWriter(folder, samples_per_shard=max(1, samples // 8)) as writer:
            for i in range(samples):
                writer.add(f"{i:06d}", {"jpg": images[i % len(images)], "txt": f"picture {i}".encode()})
        yield folder


def _interloom_pairs(folder: str, workers: int, size: int, batch_size: int) -> Iterator[int]:
    from ..data.pairs.dataset import PairsConfig, PairsTransform, pairs_loader

    config = PairsConfig(
        train=[folder], image_size=size, batch_size=batch_size, workers=workers, augment=None, fit="stretch"
    )
    transform = PairsTransform(config, train=False)
    for batch in pairs_loader(config):
        yield len(transform(batch)["pixel_values"])


def _webdataset_pairs(folder: str, workers: int, size: int, batch_size: int) -> Iterator[int]:
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    def to_tensor(image: Image.Image) -> torch.Tensor:
        resized = image.resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255)

    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    pipeline = (
        WebDataset(shards, shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(to_tensor, str)
        .batched(batch_size)
    )
    for pixels, _ in DataLoader(pipeline, batch_size=None, num_workers=workers):  # type: ignore[arg-type]
        yield len(pixels)


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from ..messages import console as new_console

    table = Table("comparison", "side", "samples/s", "ratio")
    for result in results:
        for number, (name, speed) in enumerate(result["samples_per_second"].items()):
            ratio = result["spread"] if number == 0 else ""
            table.add_row(result["title"] if number == 0 else "", name, f"{speed:,.1f}", ratio)
    new_console().print(table)
