"""Configurations and checkpoints of runs that were made to harm."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .checkpoints import convert
from .harness import Call, Case, case, command, guarded


def sources(root: Path, text: str) -> Call:
    (root / "config.yaml").write_text(text)

    def work() -> None:
        from interloom.train.data.shards.reader import ShardSet
        from interloom.train.evaluation.idefics.document_sources import find_sources

        for folders in find_sources(root / "config.yaml", "val").values():
            ShardSet.open(folders, kind="documents")

    return guarded(work)


@case(sample=True)
def draw_a_configuration_that_asks_for_a_secret(root: Path) -> Case:
    return Case(
        sources(root, "data:\n  val:\n    a: ['http://127.0.0.1:9/${oc.env:HOME}']\n"), 2, "not resolved"
    )


@case()
def draw_a_configuration_that_names_an_address(root: Path) -> Case:
    return Case(sources(root, "data:\n  val:\n    a: ['http://127.0.0.1:9/x']\n"), 2, "not contacted")


@case(sample=True)
def draw_a_configuration_of_aliases(root: Path) -> Case:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return Case(sources(root, "\n".join(lines)), 2, "aliases")


@case()
def draw_a_configuration_of_a_hundred_billion_shards(root: Path) -> Case:
    return Case(sources(root, "data:\n  val:\n    a: ['/tmp/{0..100000000000}.tar']\n"), 2, "shards")


@case()
def draw_a_configuration_that_makes_an_object(root: Path) -> Case:
    return Case(sources(root, "data: !!python/object/apply:os.system ['touch ran']\n"), 2, "configuration")


@case()
def draw_a_deep_run_configuration(root: Path) -> Case:
    return Case(sources(root, "[" * 50_000), 2, "configuration")


def sharded(root: Path, marker: str) -> Call:
    folder = root / "000001.shards"
    folder.mkdir()
    (folder / "COMPLETE").write_text(marker)
    (folder / "state.pt").write_bytes(b"x")
    return convert(folder)


@case()
def draw_a_marker_that_leads_out(root: Path) -> Case:
    entry = {"bytes": 1, "sha256": "0"}
    files = {"../../etc/hostname": entry, "a\0b": entry, ".metadata": entry, "state.pt": entry}
    return Case(sharded(root, json.dumps({"format": 1, "files": files})), 2, "")


@case()
def draw_a_deep_marker(root: Path) -> Case:
    return Case(sharded(root, "[" * 100_000), 2, "")


@case()
def draw_a_marker_of_odd_kinds(root: Path) -> Case:
    return Case(
        sharded(root, json.dumps({"format": 1, "files": {"a": {"bytes": 1e400, "sha256": []}}})), 2, ""
    )


@case()
def draw_a_checkpoint_of_code(root: Path) -> Case:
    class Code:
        def __reduce__(self) -> Any:
            return os.system, ("touch ran",)

    torch.save({"interloom": Code(), "state_dict": {}}, root / "a.ckpt")
    return Case(command("convert", root / "a.ckpt", root / "out"), 2, "never loaded")
