"""Files made to harm: each ends with one sentence, or with its bad record counted, in little memory and time.

Every case is drawn into an empty folder and given to the command, in a process of its own (see ``conftest.py``). All of
them run with ``make test-faults``; those marked as the sample run with ``make test`` too. SECURITY.md names the kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .hostile import beside_weights, documents, pairs, runs, shards, weights  # noqa: F401
from .hostile.harness import DRAWN, SAMPLE, SECRET


def run(name: str, root: Path, limited: Any) -> None:
    drawn = DRAWN[name](root)
    ending = limited(drawn.call, root)
    print(f"{name}: exit {ending.code}, {ending.seconds:.1f} s, {ending.peak / 2**20:,.0f} MiB")
    ending.check(drawn.code)
    assert drawn.says.lower() in (ending.out + ending.err).lower(), ending.out + ending.err
    assert SECRET not in ending.out + ending.err
    assert not (root / "ran").exists(), "code of a file ran"
    if drawn.code:
        assert not (root / "out" / "model.safetensors").exists(), "something half-written stays"
    for path in (root / "out").rglob("*") if (root / "out").exists() else ():
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_sample(name: str, tmp_path: Path, limited: Any) -> None:
    run(name, tmp_path, limited)


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(set(DRAWN) - SAMPLE))
def test_hostile_files(name: str, tmp_path: Path, limited: Any) -> None:
    run(name, tmp_path, limited)
