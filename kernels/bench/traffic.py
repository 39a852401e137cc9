"""Bytes and floating-point operations of kernels, counted exactly while Triton interprets them.

Every load and store of the interpreter (plain, masked, through a descriptor, atomic) passes four builder
methods; :func:`count_traffic` wraps them and adds up what the mask lets through. That is the traffic between
the multiprocessors and the memory system with no cache in between: what a tile needs again, it loads again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .interpreter import replaced

Program = tuple[int, int, int]
Sample = Sequence[tuple[Sequence[Program], int]]
"""Groups of programs that do the same work: the representatives to run, and how many the group has."""

SECTOR = 32
"""Bytes a GPU fetches at least: the granularity of its level-2 cache."""


@dataclass
class KernelTraffic:
    """What one kernel moved and computed, over all its launches.

    ``loaded``, ``stored`` and ``atomic`` are bytes (an atomic update counts its operand once), ``sectors``
    adds up the distinct 32-byte sectors of each tile access, ``flops`` is 2·M·N·K of each ``tl.dot``.
    """

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    sectors: int = 0
    flops: int = 0
    launches: int = 0
    programs: int = 0

    @property
    def moved(self) -> int:
        """Bytes loaded, stored and updated."""
        return self.loaded + self.stored + self.atomic

    @property
    def work(self) -> tuple[int, int, int, int, int]:
        """The counts that a program adds to."""
        return self.loaded, self.stored, self.atomic, self.sectors, self.flops

    def add(self, work: tuple[int, int, int, int, int], times: int = 1) -> None:
        """Add ``times`` the ``work`` of a program."""
        loaded, stored, atomic, sectors, flops = work
        self.loaded += loaded * times
        self.stored += stored * times
        self.atomic += atomic * times
        self.sectors += sectors * times
        self.flops += flops * times


@dataclass
class CountedTraffic:
    """The counts of a :func:`count_traffic` block, by kernel name and in sum."""

    kernels: dict[str, KernelTraffic] = field(default_factory=dict)
    _watched: list[tuple[int, int, list[int]]] = field(default_factory=list)

    @property
    def loaded(self) -> int:
        return sum(kernel.loaded for kernel in self.kernels.values())

    @property
    def stored(self) -> int:
        return sum(kernel.stored for kernel in self.kernels.values())

    @property
    def atomic(self) -> int:
        return sum(kernel.atomic for kernel in self.kernels.values())

    @property
    def moved(self) -> int:
        return sum(kernel.moved for kernel in self.kernels.values())

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels.values())

    @property
    def sectors(self) -> int:
        return sum(kernel.sectors for kernel in self.kernels.values())

    def watch(self, tensor: torch.Tensor) -> list[int]:
        """Count apart what falls into the storage of ``tensor``: a live list [loaded, stored], in bytes.

        Atomic updates count as stored.
        """
        storage = tensor.untyped_storage()
        counts = [0, 0]
        self._watched.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes(), counts))
        return counts


@contextmanager
def count_traffic(
    *, sectors: bool = False, sample: Callable[[str, Program], Sample | None] | None = None
) -> Iterator[CountedTraffic]:
    """Count what the kernels interpreted within the block move and compute.

    Args:
        sectors: also count distinct 32-byte sectors (slower: sorts the addresses of every access).
        sample: given a kernel's name and grid, the programs to run and for how many each group of them
            stands, or None to run all. The others do not run, so outputs are incomplete and ``watch`` sees
            the sample alone; for counting at sizes too large to interpret whole.

    Raises:
        ValueError: the representatives of a group did not move and compute the same (at the launch).
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    traffic = CountedTraffic()
    current = [KernelTraffic()]

    def tally(pointers: np.ndarray, mask: Any, itemsize: int, kind: str) -> None:
        active = np.broadcast_to(np.asarray(mask), pointers.shape)
        moved = int(np.count_nonzero(active)) * itemsize
        kernel = current[0]
        setattr(kernel, kind, getattr(kernel, kind) + moved)
        if sectors and moved:
            # Elements are aligned to their size, so none straddles two sectors.
            kernel.sectors += int(np.unique(pointers[active] // np.uint64(SECTOR)).size)
        for begin, end, counts in traffic._watched:
            inside = active & (pointers >= begin) & (pointers < end)
            counts[kind != "loaded"] += int(np.count_nonzero(inside)) * itemsize

    def counted(original: Callable, kind: str, pointer_at: int, mask_at: int | None) -> Callable:
        # What follows the mask (cache modifiers, policies, scopes) changed in Triton 3.9: pass it on.
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            pointers = args[pointer_at]
            mask = True if mask_at is None else args[mask_at]
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            tally(np.asarray(pointers.data), getattr(mask, "data", mask), itemsize, kind)
            return original(self, *args, **kwargs)

        return wrapper

    original_dot, original_call = builder.create_dot, executor.__call__

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        *batch, m, k = a.data.shape
        current[0].flops += 2 * int(np.prod(batch, dtype=np.int64)) * m * k * b.data.shape[-1]
        return original_dot(self, a, b, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        current[0] = traffic.kernels.setdefault(name, KernelTraffic())
        current[0].launches += 1
        # The interpreter copies arguments with PyTorch operators, which a mode must not take for ours.
        with _disable_current_modes(), _sampled_programs(self, name, sample, current):
            original_call(self, *args, **kwargs)

    accesses = {
        "create_masked_load": counted(builder.create_masked_load, "loaded", 0, 1),
        "create_masked_store": counted(builder.create_masked_store, "stored", 0, 2),
        "create_atomic_rmw": counted(builder.create_atomic_rmw, "atomic", 1, 3),
        "create_atomic_cas": counted(builder.create_atomic_cas, "atomic", 0, None),
    }
    with replaced(builder, create_dot=create_dot, **accesses), replaced(executor, __call__=call):
        yield traffic


def full_grid(grid: Any, meta: Any) -> tuple[int, int, int]:
    """The three extents of a launch grid, which may be shorter, or a function of the arguments ``meta``."""
    x, y, z = (*(grid if isinstance(grid, tuple | list) else grid(meta)), 1, 1)[:3]
    return x, y, z


@contextmanager
def _sampled_programs(
    executor: Any, name: str, sample: Callable | None, current: list[KernelTraffic]
) -> Iterator[None]:
    """Make the executor's loop over the grid visit the sample only, and scale what it counts to the grid."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    kernel = current[0]
    launched = executor.grid
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    extents: Program = (1, 1, 1)
    groups: Sample | None = None
    visited: list[Program] = []
    works: list[KernelTraffic] = []

    def grid(meta: Any) -> Program:
        nonlocal extents, groups
        extents = full_grid(launched, meta)
        kernel.programs += extents[0] * extents[1] * extents[2]
        groups = sample(name, extents) if sample is not None else None
        if groups is None:
            return extents
        visited.extend(program for representatives, _ in groups for program in representatives)
        return len(visited), 1, 1

    def set_grid_dim(*_: int) -> None:
        set_dim(*extents)

    def set_grid_idx(*program: int) -> None:
        if groups is None:
            set_idx(*program)
        else:
            set_idx(*visited[program[0]])
            current[0] = KernelTraffic()
            works.append(current[0])

    executor.grid = grid
    try:
        with replaced(builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
            yield
    finally:
        executor.grid = launched
    if groups is not None:
        _scale(name, kernel, groups, [work.work for work in works])


def _scale(name: str, kernel: KernelTraffic, groups: Sample, works: list[tuple[int, ...]]) -> None:
    done = 0
    for representatives, population in groups:
        own = works[done : done + len(representatives)]
        done += len(representatives)
        if len(set(own)) != 1:
            raise ValueError(
                f"programs {list(representatives)} of {name} do not all do the same: {own}; run them all."
            )
        kernel.add(own[0], population)  # type: ignore[arg-type]
