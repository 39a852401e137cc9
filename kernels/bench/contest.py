"""What every comparison here and in ``train/bench`` shares: turns, peaks of memory, and the machine in a line."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

Figure = TypeVar("Figure")


def in_turn(
    sides: Mapping[str, Callable[[], Figure]],
    rounds: int,
    *,
    warm_up: int = 0,
    report: Callable[[str], None] | None = None,
) -> dict[str, list[Figure]]:
    """Call the sides one after the other, round by round, so that a machine that is busy for a while slows all.

    Args:
        sides: name to what measures it once.
        rounds: calls of each that count.
        warm_up: rounds before these whose figures are dropped: they import, compile and fill caches.
        report: told of every figure that counts, in a line.

    Returns:
        Name to the figures, in order.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in sides}
    for attempt in range(-warm_up, rounds):
        for name, measure in sides.items():
            figure = measure()
            if attempt < 0:
                continue
            figures[name].append(figure)
            if report is not None:
                shown = f"{figure:.4g}" if isinstance(figure, float) else figure
                report(f"round {attempt + 1}, {name}: {shown}")
    return figures


def resident_bytes() -> int:
    """What the process holds in memory now; where the system does not say, at its peak."""
    return _memory("VmRSS")


def peak_bytes() -> int:
    """The most that the process held since :func:`reset_peak`; where that cannot reset it, since its start."""
    return _memory("VmHWM")


def reset_peak() -> None:
    """Let the peak count from here, where the kernel can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes) * 1024


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code: versions, processors, threads, and how busy the machine is."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def environment_line() -> str:
    """:func:`environment` in one line for people."""
    return ", ".join(f"{name} {value}" for name, value in environment().items() if value is not None)


def say(line: str) -> None:
    """Progress, beside whatever is printed as a result."""
    print(line, file=sys.stderr, flush=True)
