"""Freed memory of the process, kept for the next step instead of given back to the system."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1
LARGEST_KEPT_BLOCK = 2**30


def keep_freed_memory() -> bool:
    """Let glibc reuse blocks below 1 GiB; whether there is a glibc to tell.

    A step on the CPU frees the same activations that the next one asks for. By default glibc returns them to the
    system in between, and the system clears every page again. The process grows no larger than it would; it only
    no longer shrinks between steps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    # Either alone freezes glibc's own threshold for separate mappings at 128 KiB and makes matters worse.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
