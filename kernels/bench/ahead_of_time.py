"""Compile the launches of an operation for devices that are not there.

Inside :func:`compile_launches` every ``kernel[grid](…)`` is specialised exactly as it would be at run time
(types, divisibility by 16, arguments equal to one, the launch table of the architecture) and compiled, but
not launched: outputs stay uninitialised, and tensors may live on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..common.arch import ARCHITECTURES, assume_architecture
from .interpreter import replaced
from .traffic import full_grid


@dataclass(frozen=True)
class CompiledLaunch:
    """One distinct kernel that was launched, compiled for the target, with the grid of its first launch."""

    name: str
    compiled: Any
    grid: tuple[int, int, int]


def compile_environment() -> dict[str, str]:
    """Environment for a process that compiles: never interpreting, and with fused multiply-add stated."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Triton 3.10 changes the default.
    return environment | {"TRITON_DEFAULT_FP_FUSION": "1"}


@contextmanager
def compile_launches(target: str) -> Iterator[list[CompiledLaunch]]:
    """Compile instead of launching; yields the growing list of distinct kernels.

    Args:
        target: one of ``ARCHITECTURES``.

    Raises:
        ValueError: the target is unknown, or this process interprets Triton kernels.
    """
    from triton.runtime import jit

    launches: list[CompiledLaunch] = []
    seen: set[int] = set()
    launch = jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in seen:
            seen.add(id(compiled))
            named = {name: value for name, value in kwargs.items() if name in self.arg_names}
            meta = self.signature.bind_partial(*args, **named).arguments
            launches.append(CompiledLaunch(self.__name__, compiled, full_grid(grid, meta)))
        return compiled

    with _absent_device(target), replaced(jit.JITFunction, run=run):
        yield launches


@contextmanager
def collect_variants(target: str) -> Iterator[dict[str, set[str]]]:
    """Collect, by kernel, the keys under which Triton would compile what is launched, and compile nothing.

    A key is Triton's own: types, divisibility by 16, arguments equal to one, constants, options. Every new one of a
    process costs a compilation, of seconds, on a device. Arguments as for :func:`compile_launches`.
    """
    from triton import knobs

    found: dict[str, set[str]] = {}

    def instead_of_compiling(*, key: str, fn: Any, **_: Any) -> bool:
        found.setdefault(fn.name.rpartition(".")[2], set()).add(str(key))
        return True

    with _absent_device(target), replaced(knobs.runtime, jit_cache_hook=instead_of_compiling):
        yield found


@contextmanager
def _absent_device(target: str) -> Iterator[None]:
    """Within the block, Triton and the launch tables take ``target`` for the current device."""
    from triton.runtime import driver

    if target not in ARCHITECTURES:
        raise ValueError(f"target {target!r} is not known; use one of {', '.join(ARCHITECTURES)}.")
    if os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}:
        raise ValueError(
            "TRITON_INTERPRET is set, so kernels cannot be compiled here; unset it and start again."
        )
    active = driver._active
    driver.set_active(_AbsentDevice(target))  # type: ignore[arg-type]
    try:
        with assume_architecture(target):
            yield
    finally:
        driver._active = active


class _AbsentDevice:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, target: str) -> None:
        self.name = target

    def get_current_device(self) -> str:
        # Triton keys its cache of compiled kernels by device.
        return self.name

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)
