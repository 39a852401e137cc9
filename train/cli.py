"""The ``interloom`` command: one verb a line, each imported only when it is called."""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """Run ``interloom <verb> …`` and return its exit code."""
    raise NotImplementedError
