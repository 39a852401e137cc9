"""What all launches have in common: the device, the column of a launch table, the precision of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from .arch import architecture

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def device_guard(tensor: torch.Tensor) -> AbstractContextManager:
    """Within the block, the device of ``tensor`` is the current one: Triton launches there, wherever pointers lead."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher under the device of its first argument, a tensor."""

    @wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        with device_guard(args[0]):  # type: ignore[arg-type]
            return launch(*args, **kwargs)

    return guarded


def launch_column(table: Mapping[str, T], tensor: torch.Tensor) -> T:
    """The entry of a launch table for the device of ``tensor``.

    Where a table has no column for them, the cards that allow a program 99 KB of shared memory and multiply by
    mma.sync (sm_86, sm_89, and sm_120 of consumer Blackwell, which has no tcgen05) share that of sm_86, or, where its
    tiles fit them, of sm_80 (A100, 163 KB).
    """
    name = architecture(tensor)
    return next(table[column] for column in (name, "sm_86", "sm_80") if column in table)


def dot_precision(tensor: torch.Tensor) -> str:
    """``tl.dot``'s input_precision: float32 products stay exact to float32 unless torch was told tf32 will do."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if architecture(tensor).startswith("sm_") else "ieee"
