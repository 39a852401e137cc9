"""Records of documents that were made to harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

from PIL import Image

from .harness import Call, Case, case, command, picture, png, serve, write_a_huge_cell


def documents(root: Path, source: Path, *more: object, filters: bool = False) -> Call:
    from interloom.train.data.drawn.documents import write_tokenizer

    write_tokenizer(root / "tokenizer")
    return command(
        "data",
        "obelics",
        source,
        root / "out",
        "--tokenizer",
        root / "tokenizer",
        "--workers",
        1,
        *([] if filters else ["--no-filters"]),
        *more,
    )


def records(root: Path, *texts: str) -> Path:
    good = [
        json.dumps({"images": [None], "texts": [f"a document of several words, number {n}"]})
        for n in range(5)
    ]
    (root / "a.jsonl").write_text("\n".join([*good, *texts]) + "\n")
    return root / "a.jsonl"


@case(sample=True)
def draw_a_deep_record(root: Path) -> Case:
    return Case(documents(root, records(root, "[" * 100_000)), 0, "not a JSON object")


@case()
def draw_deep_metadata(root: Path) -> Case:
    bad = json.dumps({"images": [None], "texts": ["some words"], "metadata": "[" * 100_000})
    return Case(documents(root, records(root, bad)), 0, "")


@case()
def draw_a_picture_whose_name_has_nul(root: Path) -> Case:
    bad = json.dumps({"images": ["a\0b.png", None], "texts": [None, "some words beside it"]})
    return Case(documents(root, records(root, bad), "--image-root", root), 0, "")


@case()
def draw_a_picture_out_of_the_folder(root: Path) -> Case:
    bad = json.dumps(
        {"images": ["/etc/hostname", "../x.png", None], "texts": [None, None, "some words beside it"]}
    )
    (root / "pictures").mkdir()
    return Case(
        documents(root, records(root, bad), "--image-root", root / "pictures"), 0, "out of the image folder"
    )


@case()
def draw_a_picture_of_sixty_million_forty_times(root: Path) -> Case:
    (root / "pictures").mkdir()
    Image.new("RGB", (62_000, 1_000), (200, 30, 60)).save(root / "pictures" / "a.png")
    bad = json.dumps({"images": ["a.png"] * 40 + [None], "texts": [None] * 40 + ["some words beside it"]})
    picture(root / "pictures" / "good.png", (300, 200))
    words = " ".join(f"word{number} of the text about {number}" for number in range(40))
    good = json.dumps({"images": ["good.png", None], "texts": [None, words]})
    (root / "a.jsonl").write_text("\n".join([good, bad]) + "\n")
    source = documents(root, root / "a.jsonl", "--image-root", root / "pictures", filters=True)
    return Case(source, 0, "image larger than 20000 px")


@case()
def draw_a_record_of_a_hundred_and_twenty_addresses(root: Path) -> Case:
    """Each on a host of its own kind, so that no limit of one host holds, and each of nearly the most bytes."""
    body = png(24, 24, padding=19 * 2**20)
    ports = [serve(f"127.0.0.{number}", body) for number in range(1, 31)]
    hosts = [f"127.0.0.{number}:{port}" for number, port in enumerate(ports, 1)]
    images: list[str | None] = [f"http://{host}/{n}.png" for host in hosts for n in range(4)]
    bad = json.dumps({"images": [*images, None], "texts": [None] * 120 + ["some words beside them"]})
    allowed = [part for host in hosts for part in ("--fetch-allow-host", host)]
    return Case(documents(root, records(root, bad), "--fetch", *allowed), 0, "256 MiB in one document")


@case()
def draw_a_record_of_two_gibibytes(root: Path) -> Case:
    write_a_huge_cell(root / "a.parquet", ("images", "texts"), "texts")
    return Case(documents(root, root / "a.parquet"), 2, "row group of more than")


@case()
def draw_records_that_are_a_pipe(root: Path) -> Case:
    os.mkfifo(root / "a.jsonl")
    return Case(documents(root, root / "a.jsonl"), 2, "pipe")
