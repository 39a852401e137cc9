"""Who may import whom: the floors of ARCHITECTURE.md, read from the syntax tree, imports inside functions counted."""

from __future__ import annotations

import ast
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "models", "train", "conf")
# From the top floor down; what stands in one row may not import one another either, but for itself.
TRAIN_FLOORS = (
    ("cli",),
    ("commands", "bench"),
    ("fitting", "trainer"),
    ("objectives",),
    ("callbacks", "strategies", "evaluation"),
    ("checkpointing",),
    ("runs",),
    ("parallel", "optim", "planning", "data"),
    ("config", "files", "messages", "exit_codes"),
)
# Within a row, these may call those.
SAME_ROW = {
    ("fitting", "trainer"),
    ("bench", "commands"),
    ("callbacks", "evaluation"),
    ("strategies", "callbacks"),
    ("data", "parallel"),
    ("optim", "parallel"),
    ("files", "messages"),
}
# Entry points: they start a verb and hold nothing else.
ENTRIES = {"train", "train.__main__", "train.evaluation.__main__", "train.sweep_table"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name without ``interloom``."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *ROOMS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found = {}
    for name in listed:
        path = ROOT / name
        if path.suffix == ".py" and path.exists():
            parts = Path(name).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module to the modules of the product that it imports, wherever the statement stands."""
    return {module: set(_imported(module, path)) - {module} for module, path in modules().items()}


def _imported(module: str, path: Path) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                package.split(".")[: len(package.split(".")) - node.level + 1]
                if node.level
                else ["interloom"]
            )
            head = ".".join(
                [*(["interloom"] if node.level else []), *base, *([node.module] if node.module else [])]
            )
            if not node.level:
                head = node.module or ""
            names = [f"{head}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("interloom."):
                continue
            inner = name.removeprefix("interloom.")
            while inner and inner not in modules():
                inner = inner.rpartition(".")[0]
            if inner:
                yield inner


def outside(module: str) -> set[str]:
    """Top-level names of the packages that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def room(module: str) -> str:
    """The part of ``train`` that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_rooms_import_downwards():
    order = {"kernels": 0, "models": 1, "train": 2, "conf": 3}
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if order[other.partition(".")[0]] > order[module.partition(".")[0]]
        or (module.startswith("conf") and not other.startswith("conf"))
    ]
    assert not wrong


def test_floors_of_train():
    floor = {name: number for number, names in enumerate(TRAIN_FLOORS) for name in names}
    wrong = []
    for module, others in imports().items():
        if not module.startswith("train.") or module in ENTRIES:
            continue
        for other in others:
            if not other.startswith("train."):
                continue
            own, theirs = room(module), room(other)
            if own == theirs or (own, theirs) in SAME_ROW:
                continue
            if own not in floor or theirs not in floor:
                wrong.append(f"{module} or {other} stands on no floor")
            elif floor[theirs] <= floor[own]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_no_circles():
    graph = imports()
    state: dict[str, int] = defaultdict(int)
    trail: list[str] = []
    circles: list[str] = []

    def visit(module: str) -> None:
        state[module] = 1
        trail.append(module)
        for other in sorted(graph[module]):
            # A package's face names its parts, which may name their siblings through it.
            if modules()[other].name == "__init__.py":
                continue
            if state[other] == 1:
                circles.append(" -> ".join([*trail[trail.index(other) :], other]))
            elif state[other] == 0:
                visit(other)
        trail.pop()
        state[module] = 2

    for module in sorted(graph):
        if state[module] == 0 and modules()[module].name != "__init__.py":
            visit(module)
    assert not circles, "\n".join(circles)


@pytest.mark.parametrize(
    ("package", "places"),
    [
        ("hydra", ("train.commands",)),
        ("typer", ("train.commands", "train.cli", "train.bench", "kernels.bench")),
    ],
)
def test_who_knows_the_command_line(package: str, places: tuple[str, ...]):
    wrong = [m for m in modules() if package in outside(m) and not m.startswith(places)]
    assert not wrong


def test_commands_and_benchmarks_are_called_by_the_command_line_alone():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if other.startswith(("train.commands", "train.bench"))
        and not module.startswith(("train.commands", "train.bench"))
        and module not in {"train.cli", *ENTRIES}
    ]
    assert not wrong


def test_files_are_read_in_one_sitting():
    long = {
        m: n
        for m, path in modules().items()
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_few_loose_files():
    loose = [m for m, path in modules().items() if path.parent == ROOT / "train"]
    assert len(loose) <= 12, loose
