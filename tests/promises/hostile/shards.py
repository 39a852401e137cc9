"""Tars, indexes and manifests that were made to harm."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .harness import Call, Case, case, command, guarded


def shard(folder: Path, count: int = 3) -> Path:
    from interloom.train.data.shards.writer import ShardFile

    data = io.BytesIO()
    Image.new("RGB", (24, 24)).save(data, "png")
    with ShardFile(folder / "000000.tar") as file:
        for number in range(count):
            file.add(f"{number:03d}", {"png": data.getvalue(), "txt": b"a cat"})
    return folder


def forge(folder: Path, columns: dict[str, Any] | None = None, header: dict[str, Any] | None = None) -> Path:
    """Write an index again with other values; its checksums hold."""
    from interloom.train.data.shards.index import ShardIndex, _columns_digest, _crc32_array, _seal
    from safetensors.numpy import save

    index = ShardIndex(folder / "000000.idx")
    table = {name: index.column(name).copy() for name in index.columns()} | (columns or {})
    values = {
        **index.header,
        "columns_sha256": _columns_digest(table),
        "columns_crc32": {name: _crc32_array(column) for name, column in table.items()},
        **(header or {}),
    }
    (folder / "000000.idx").write_bytes(save(table, {"interloom": _seal(values)}))
    return folder


def read_all(folder: Path) -> Call:
    """Open shards and read every sample, as training does."""

    def work() -> None:
        from interloom.train.data.report import BadSample, SkipReport
        from interloom.train.data.shards.reader import ShardReader, ShardSet

        shards = ShardSet.open([str(folder)], kind="pairs", max_skip_rate=1.0)
        reader, report = ShardReader(shards), SkipReport()
        for sample in range(len(shards)):
            try:
                reader.read(sample)
            except BadSample as bad:
                report.add_bad(bad)
        for line in report.lines():
            print(line)
        if not len(shards) or report.skipped:
            raise ValueError(f"{report.skipped} of {len(shards)} samples lost: {'; '.join(report.lines())}.")

    return guarded(work)


@case(sample=True)
def draw_offsets_of_two_to_the_62(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"offset": np.full(6, 1 << 62, np.uint64)})
    return Case(read_all(folder), 2, "offset")


@case()
def draw_lengths_of_four_gigabytes(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"length": np.full(6, (1 << 32) - 1, np.uint32)})
    return Case(read_all(folder), 2, "length")


@case()
def draw_columns_of_odd_types(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"offset": np.full((6, 2), 0.5), "key_end": np.zeros(3, np.int64)})
    return Case(read_all(folder), 2, "column")


@case()
def draw_members_out_of_order(root: Path) -> Case:
    folder = forge(shard(root / "s"), {"first_member": np.array([0, 9, 2, 6], np.uint32)})
    return Case(read_all(folder), 2, "first_member")


@case()
def draw_an_index_of_a_quadrillion_samples(root: Path) -> Case:
    return Case(read_all(forge(shard(root / "s"), header={"samples": 10**15})), 2, "samples")


@case()
def draw_an_index_without_its_header(root: Path) -> Case:
    return Case(read_all(forge(shard(root / "s"), header={"bytes": "many", "extensions": 7})), 2, "index")


@case()
def draw_an_index_that_is_a_pipe(root: Path) -> Case:
    folder = shard(root / "s")
    (folder / "000000.idx").unlink()
    os.mkfifo(folder / "000000.idx")
    return Case(read_all(folder), 2, "pipe")


@case()
def draw_a_tar_that_is_a_pipe(root: Path) -> Case:
    folder = shard(root / "s")
    (folder / "000000.tar").unlink()
    os.mkfifo(folder / "000000.tar")
    return Case(read_all(folder), 2, "")


@case()
def draw_a_tar_to_index_that_is_a_pipe(root: Path) -> Case:
    (root / "s").mkdir()
    os.mkfifo(root / "s" / "a.tar")
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "pipe")


@case()
def draw_a_tar_to_index_that_is_a_device(root: Path) -> Case:
    (root / "s").mkdir()
    (root / "s" / "a.tar").symlink_to("/dev/zero")
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "")


@case(sample=True)
def draw_a_manifest_that_leads_out(root: Path) -> Case:
    from interloom.train.data.shards.writer import MANIFEST

    shard(root / "elsewhere")
    folder = shard(root / "s")
    entry = {"shard": "../elsewhere/000000.tar", "samples": 3, "sha256": "0"}
    (folder / MANIFEST).write_text(json.dumps({"shards": [entry]}))
    return Case(read_all(folder), 2, "leads out")


@case()
def draw_a_manifest_of_odd_kinds(root: Path) -> Case:
    from interloom.train.data.shards.writer import MANIFEST

    folder = shard(root / "s")
    (folder / MANIFEST).write_text('{"shards": [7, {"shard": null}]}')
    return Case(read_all(folder), 2, "manifest")


@case()
def draw_a_deep_manifest(root: Path) -> Case:
    from interloom.train.data.shards.writer import MANIFEST

    folder = shard(root / "s")
    (folder / MANIFEST).write_text("[" * 100_000)
    return Case(read_all(folder), 2, "manifest")


@case(sample=True)
def draw_one_key_with_forty_thousand_extensions(root: Path) -> Case:
    (root / "s").mkdir()
    with tarfile.open(root / "s" / "a.tar", "w") as tar:
        for number in range(40_000):
            tar.addfile(tarfile.TarInfo(f"key.{number}.txt"))
    return Case(command("data", "pairs", root / "s", "--index-only", "--workers", 1), 2, "")
