"""The harness's results as screen tables, CSV, Markdown and plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Line = dict[str, Any]

_MOST_WIDTH = 250


@dataclass(frozen=True)
class Table:
    """Rows under a title; ``note`` says how the figures came about and ``screen`` which columns fit a screen."""

    name: str
    title: str
    note: str
    lines: Sequence[Line]
    screen: Sequence[str] = ()


def cell(value: Any) -> str:
    """A value for people: bytes and operations are scaled where the table is made, so only floats are rounded."""
    if value is None:
        return "–"
    return (
        f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def show(tables: Iterable[Table]) -> None:
    """Print tables on the screen."""
    from rich.console import Console
    from rich.table import Table as ScreenTable

    for table in tables:
        if not table.lines:
            continue
        screen = ScreenTable(
            title=table.title, caption=table.note, title_justify="left", caption_justify="left"
        )
        columns = table.screen or list(table.lines[0])
        for column in columns:
            numeric = not isinstance(table.lines[0][column], str)
            screen.add_column(column, justify="right" if numeric else "left", no_wrap=True)
        for line in table.lines:
            screen.add_row(*(cell(line[column]) for column in columns))
        console = Console()
        # Cells that are cut or wrapped cannot be read; a pipe has no width at all.
        needed = console.measure(screen, options=console.options.update_width(_MOST_WIDTH)).maximum
        Console(width=max(console.width, needed)).print(screen)


def markdown(tables: Iterable[Table], command: str) -> str:
    """All tables as Markdown, under the command that makes them."""
    parts = [f"Made by `{command}`."]
    for table in tables:
        if not table.lines:
            continue
        columns = list(table.lines[0])
        parts.append(f"## {table.title}\n\n{table.note}")
        rows = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        rows += ["| " + " | ".join(map(cell, line.values())) + " |" for line in table.lines]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def write(tables: Sequence[Table], directory: Path, command: str) -> None:
    """Write each table as NAME.csv, all as report.md, and plots of those that have one, as PNG."""
    directory.mkdir(parents=True, exist_ok=True)
    for table in tables:
        if not table.lines:
            continue
        with (directory / f"{table.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table.lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table.lines)
    (directory / "report.md").write_text(markdown(tables, command))
    by_name = {table.name: table.lines for table in tables if table.lines}
    if "bytes" in by_name:
        _plot_bytes(by_name["bytes"], directory / "bytes.png")
    if "times" in by_name:
        _plot_times(by_name["times"], directory / "times.png")


def _figure(rows: int) -> Any:
    # The object interface: pyplot would choose a window system and keep global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 1.2 + 0.42 * rows), layout="constrained")


def _plot_bytes(lines: Sequence[Line], path: Path) -> None:
    """Bytes moved over the floor, ours and eager's, one pair of bars a pass."""
    figure = _figure(len(lines))
    axes = figure.subplots()
    places = range(len(lines))
    axes.barh([p - 0.2 for p in places], [line["moved / floor"] for line in lines], 0.4, label="interloom")
    axes.barh([p + 0.2 for p in places], [line["eager / floor"] for line in lines], 0.4, label="eager")
    axes.set_yticks(list(places), [f"{line['operation']}, {line['model']}, {line['pass']}" for line in lines])
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], labels=["1", "2", "5", "10", "20"])
    axes.set_ylim(len(lines) - 0.3, -0.7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("bytes moved / floor (counted)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _plot_times(lines: Sequence[Line], path: Path) -> None:
    """Median times with their quantiles, grouped by case; what could not be timed is left out."""
    lines = [line for line in lines if line["median ms"] is not None]
    if not lines:
        return
    figure = _figure(len(lines))
    axes = figure.subplots()
    places = range(len(lines))
    medians = [line["median ms"] for line in lines]
    spread = [
        [line["median ms"] - line["20% ms"] for line in lines],
        [line["80% ms"] - line["median ms"] for line in lines],
    ]
    axes.barh(list(places), medians, xerr=spread)
    names = [
        f"{line['operation']}, {line['model']}, {line['pass']}, {line.get('mode', 'calls')}: {line['implementation']}"
        for line in lines
    ]
    axes.set_yticks(list(places), names)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds on {lines[0]['device']}")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)
