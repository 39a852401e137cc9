"""The device a kernel is launched for: which column of an operation's launch table applies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
INTERPRETER = "interpret"
"""What a tensor on the CPU is launched for: Triton's interpreter, with tiles small enough for tests."""

# One representative device each: A100, RTX A6000, L40S, H100 SXM, B200, RTX PRO 6000, MI300X.
_MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 142,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
    INTERPRETER: 4,
}

_assumed: ContextVar[str | None] = ContextVar("assumed_architecture", default=None)


@contextmanager
def assume_architecture(name: str) -> Iterator[None]:
    """Choose launch configurations as if every tensor lived on a device of architecture ``name``.

    For compiling ahead of time and for counting what a configuration moves; nothing is launched on a device.

    Raises:
        ValueError: ``name`` is not one of ``ARCHITECTURES`` or ``"interpret"``.
    """
    if name not in _MULTIPROCESSORS:
        raise ValueError(f"architecture {name!r} is not known; use one of {', '.join(_MULTIPROCESSORS)}.")
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def assumed_architecture() -> str | None:
    """The architecture of the enclosing ``assume_architecture``, or None outside any.

    None while a graph is made as well: ``torch.compile`` cannot look into a ``ContextVar``, and a graph is for the
    device it runs on.
    """
    return None if torch.compiler.is_compiling() else _assumed.get()


def architecture(tensor: torch.Tensor) -> str:
    """Return what ``tensor`` lives on: one of ``ARCHITECTURES``, or ``"interpret"`` on the CPU.

    A device that is none of them counts as the nearest one whose shared memory it certainly has.
    """
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _device_architecture(tensor.device)


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many streaming multiprocessors (NVIDIA) or compute units (AMD) share the programs of a launch."""
    assumed = _assumed.get()
    if assumed is not None:
        return _MULTIPROCESSORS[assumed]
    if tensor.device.type != "cuda":
        return _MULTIPROCESSORS[INTERPRETER]
    return _device_multiprocessors(tensor.device)


@lru_cache
def _device_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def _device_architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
