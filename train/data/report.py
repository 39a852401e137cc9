"""What was lost on the way from a source to a batch: counted per reason, and named.

Every part of the data room that leaves something out says so to a :class:`SkipReport`; nothing is dropped
without an entry. A report is small whatever the data: the counts are exact, the names are the first
``max_names`` of each reason. Reports add up, so workers and ranks can keep their own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically

_ADDRESS = re.compile(r" (?:object )?at 0x[0-9a-fA-F]+")


def printable(name: str) -> str:
    """A name that is safe to show: control and undecodable characters escaped, length bounded."""
    text = name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode("ascii")
    return text[:300] + "…" if len(text) > 300 else text


class BadSample(Exception):
    """One sample that cannot be used: ``reason`` is a short fixed phrase, ``name`` says which sample."""

    def __init__(self, reason: str, name: str, detail: str = "") -> None:
        super().__init__(reason, name, detail)
        self.reason, self.name = reason, name
        # Messages of libraries name objects by their address: the same loss shall read the same twice.
        self.detail = _ADDRESS.sub("", detail)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class SkipRateError(ValueError):
    """More samples were skipped than the run allows."""


class SkipReport:
    """Counts of skipped things per reason, with the first names of each.

    Args:
        max_names: how many names are kept for each reason; counts are always exact.

    Attributes:
        seen: samples looked at, good and bad.
        kept: samples that are there, where ``seen`` without ``skipped`` does not tell (a damaged tar loses an unknown
            number of them); else None.
    """

    def __init__(self, max_names: int = 100) -> None:
        self.max_names = max_names
        self.seen = 0
        self.kept: int | None = None
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}
        self.notes: set[str] = set()

    @property
    def skipped(self) -> int:
        """Number of skipped things, all reasons together; what was only noted is none of them."""
        return sum(count for reason, count in self.counts.items() if reason not in self.notes)

    def note(self, reason: str, name: str, detail: str = "", count: int = 1) -> None:
        """Count what cost no sample: files and members that are not read, a text that was mended."""
        self.notes.add(reason)
        self.add(reason, name, detail, count)

    def add(self, reason: str, name: str, detail: str = "", count: int = 1) -> None:
        """Count ``count`` losses of one reason and remember the name."""
        self.counts[reason] += count
        names = self.names.setdefault(reason, [])
        if len(names) < self.max_names:
            names.append(printable(f"{name} ({detail})" if detail else name))

    def add_bad(self, bad: BadSample) -> None:
        """Count one :class:`BadSample`."""
        self.add(bad.reason, bad.name, bad.detail)

    def merge(self, other: SkipReport | Mapping[str, Any]) -> None:
        """Add another report, or its :meth:`to_dict`."""
        data = other.to_dict() if isinstance(other, SkipReport) else other
        self.seen += int(data.get("seen", 0))
        for reason, entry in data.get("reasons", {}).items():
            self.counts[reason] += int(entry["count"])
            if not entry.get("lost", True):
                self.notes.add(reason)
            names = self.names.setdefault(reason, [])
            names.extend(entry["names"][: self.max_names - len(names)])

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON, an index's metadata or a checkpoint."""
        reasons: dict[str, Any] = {}
        for reason in sorted(self.counts):
            reasons[reason] = {"count": self.counts[reason], "names": self.names[reason]}
            if reason in self.notes:
                reasons[reason]["lost"] = False
        return {"seen": self.seen, "skipped": self.skipped, "reasons": reasons}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], max_names: int = 100) -> SkipReport:
        """The report that :meth:`to_dict` gave."""
        report = cls(max_names)
        report.merge(data)
        return report

    def to_json(self) -> bytes:
        """The report as the text of a file."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_atomically(path, self.to_json())

    def lines(self, names: int = 3, *, lost: bool | None = None) -> Iterable[str]:
        """One line a reason, with its first names: for a terminal or an error.

        ``lost`` true shows only what cost samples, false only what was noted.
        """
        for reason, count in self.counts.most_common():
            if lost is not None and lost == (reason in self.notes):
                continue
            shown = ", ".join(self.names[reason][:names])
            more = ", …" if count > names else ""
            yield f"{count} × {reason}: {shown}{more}"

    def check(self, max_skip_rate: float, min_seen: int = 1000) -> None:
        """Stop when more than ``max_skip_rate`` of the samples seen were skipped.

        The rate means little before ``min_seen`` samples, so it is not judged earlier.

        Raises:
            SkipRateError: naming the reasons and the first samples.
        """
        if self.skipped and self.seen >= min_seen and self.skipped > max_skip_rate * self.seen:
            what = "; ".join(self.lines(lost=True))
            raise SkipRateError(
                f"{self.skipped} of {self.seen} samples were skipped, more than the allowed share of "
                f"{max_skip_rate:g} ({what}); repair the data (`interloom data verify DIR` lists what is "
                "broken) or raise max_skip_rate"
            )
