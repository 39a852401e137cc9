"""Folders, tables and pictures of pairs that were made to harm."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .harness import SECRET, Call, Case, case, command, picture, png, write_a_huge_cell


def folder_of(root: Path) -> Path:
    (root / "p").mkdir()
    for number in range(12):
        picture(root / "p" / f"good{number}.png", (24, 24 + number))
        (root / "p" / f"good{number}.txt").write_text("a cat")
    return root / "p"


def pairs(folder: Path, *more: object) -> Call:
    return command("data", "pairs", folder, folder.parent / "out", "--workers", 1, *more)


@case(sample=True)
def draw_two_links_to_the_folder_itself(root: Path) -> Case:
    folder = folder_of(root)
    (folder / "x").symlink_to(".")
    (folder / "y").symlink_to(".")
    return Case(pairs(folder, "--follow-links"), 0, "12 pairs")


@case()
def draw_a_picture_and_a_caption_that_lead_out(root: Path) -> Case:
    folder = folder_of(root)
    (root / "secret").write_text(SECRET)
    picture(folder / "bad.png")
    (folder / "bad.txt").symlink_to("../secret")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "link out of the folder")


@case()
def draw_a_picture_of_one_by_sixty_million(root: Path) -> Case:
    folder = folder_of(root)
    (folder / "bad.png").write_bytes(png(1, 60_000_000))
    (folder / "bad.txt").write_text("a dog")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "too many pixels")


@case()
def draw_a_jpeg_of_two_thousand_scans(root: Path) -> Case:
    folder = folder_of(root)
    data = io.BytesIO()
    Image.effect_noise((1500, 1500), 50).convert("RGB").save(data, "jpeg", progressive=True)
    content = data.getvalue()
    last = content.rfind(b"\xff\xda")
    (folder / "bad.jpg").write_bytes(content[:-2] + content[last:-2] * 2000 + b"\xff\xd9")
    (folder / "bad.txt").write_text("a dog")
    return Case(pairs(folder, "--max-skip-rate", 0.5), 0, "")


@case(sample=True)
def draw_a_table_whose_paths_lead_out(root: Path) -> Case:
    (root / "t").mkdir()
    picture(root / "secret.png")
    rows = ["../secret.png,a cat", f"{root / 'secret.png'},a cat", "/etc/hostname,a cat", "a\0b.png,a cat"]
    (root / "t" / "a.csv").write_text("image,caption\n" + "\n".join(rows) + "\n")
    return Case(command("data", "pairs", root / "t" / "a.csv", root / "out", "--workers", 1), 2, "")


@case()
def draw_a_table_that_is_a_pipe(root: Path) -> Case:
    os.mkfifo(root / "a.csv")
    return Case(command("data", "pairs", root / "a.csv", root / "out", "--workers", 1), 2, "pipe")


@case()
def draw_a_parquet_of_twenty_million_rows(root: Path) -> Case:
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(20_000_000, np.int8)), pyarrow.array(["x" * 100])
    )
    table = pyarrow.table({"image": rows, "caption": rows})
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=20_000_000)
    return Case(command("data", "pairs", root / "a.parquet", root / "out", "--workers", 1), 2, "")


@case()
def draw_a_parquet_with_a_cell_of_two_gibibytes(root: Path) -> Case:
    write_a_huge_cell(root / "a.parquet", ("image", "caption"), "caption")
    pairs = command("data", "pairs", root / "a.parquet", root / "out", "--workers", 1)
    return Case(pairs, 2, "row group of more than")
