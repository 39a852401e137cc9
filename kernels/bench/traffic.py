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

from .interpreter import replaced

Programs = Sequence[tuple[int, int, int]]
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


@dataclass
class Traffic:
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
    *, sectors: bool = False, select: Callable[[str, tuple[int, int, int]], Programs | None] | None = None
) -> Iterator[Traffic]:
    """Count what the kernels interpreted within the block move and compute.

    Args:
        sectors: also count distinct 32-byte sectors (slower: sorts the addresses of every access).
        select: given a kernel's name and grid, the programs to run, or None for all. The others do not run,
            so outputs are incomplete; for counting at sizes too large to interpret whole.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    traffic = Traffic()
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
        with _selected_programs(self, name, select, current[0]):
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
    x, y, z = (*(grid(meta) if callable(grid) else grid), 1, 1)[:3]
    return x, y, z


@contextmanager
def _selected_programs(
    executor: Any, name: str, select: Callable | None, kernel: KernelTraffic
) -> Iterator[None]:
    """Make the executor's loop over the grid visit the selected programs only, under their true indices."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    launched: Any = executor.grid
    chosen: list[Programs | None] = [None]
    true_grid = [(1, 1, 1)]
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx

    def grid(meta: Any) -> tuple[int, ...]:
        x, y, z = full_grid(launched, meta)
        kernel.programs += x * y * z
        chosen[0] = select(name, (x, y, z)) if select is not None else None
        true_grid[0] = (x, y, z)
        return (x, y, z) if chosen[0] is None else (len(chosen[0]), 1, 1)

    def set_grid_dim(*_: int) -> None:
        set_dim(*true_grid[0])

    def set_grid_idx(x: int, y: int, z: int) -> None:
        set_idx(*((x, y, z) if chosen[0] is None else chosen[0][x]))

    executor.grid = grid
    try:
        with replaced(builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
            yield
    finally:
        executor.grid = launched
