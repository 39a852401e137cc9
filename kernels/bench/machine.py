"""The GPU that is there, or a CPU that stands for one, so that what measures a GPU runs, line by line, without one.

:class:`StandIn` has the part of ``torch.cuda`` that the harness uses, under the same names; kernels are interpreted
there. Its times are real and mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_FLUSH = 256 << 20  # bytes, more than any cache between the multiprocessors and memory


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return max((end.at - self.at) * 1e3, 1e-6)


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, stream: _Stream) -> None:
        """Everything is done when it was called."""


class _Graph:
    def replay(self) -> None:
        """What was captured was computed then; its results are there."""


@dataclass(frozen=True)
class _Properties:
    name: str = "CPU in place of a GPU"
    total_memory: int = 0
    multi_processor_count: int = 1


class StandIn:
    """``torch.cuda`` on a machine without one."""

    Event, Stream, CUDAGraph = _Event, _Stream, _Graph
    OutOfMemoryError = torch.OutOfMemoryError

    def stream(self, stream: _Stream) -> AbstractContextManager:
        return nullcontext()

    def graph(self, cuda_graph: _Graph) -> AbstractContextManager:
        return nullcontext()

    def device(self, device: Any) -> AbstractContextManager:
        return nullcontext()

    def current_stream(self) -> _Stream:
        return _Stream()

    def synchronize(self) -> None:
        """Everything is done when it was called."""

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, device: Any = None) -> _Properties:
        return _Properties()

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return 0, 0

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def reset_peak_memory_stats(self) -> None:
        """Nothing is counted."""

    def empty_cache(self) -> None:
        """Nothing is kept."""


class Machine:
    """Where the harness runs: ``cuda`` is ``torch.cuda`` or its stand-in, ``devices`` what tensors are made on."""

    def __init__(self, *, dry: bool = False) -> None:
        self.dry = dry
        self.cuda: Any = StandIn() if dry else torch.cuda
        self.devices = [torch.device("cpu" if dry else f"cuda:{i}") for i in range(self.cuda.device_count())]
        self.name = self.cuda.get_device_properties(self.device).name
        self._flush: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """(graph, what ``function`` returned in it); it has run on a side stream before, as capturing wants."""
        side = self.cuda.Stream()
        side.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(side):
            function()
        self.cuda.current_stream().wait_stream(side)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            results = function()
        return graph, results

    def measure(
        self, functions: Sequence[Callable[[], Any]], budget_ms: float, *, calls: int = 1, flush: bool = True
    ) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in milliseconds of a call, the functions taking turns.

        ``calls`` says how many a function makes; with ``flush`` the cache is overwritten before each.
        """
        for function in functions:
            function()
        once = self._timed([functions[0]], flush)[0]
        rounds = 1 if self.dry else int(min(200, max(5, budget_ms / max(once, 1e-3))))
        times = sorted(self._timed([functions[i % len(functions)] for i in range(rounds)], flush))
        low, median, high = (times[int(share * (len(times) - 1) + 0.5)] / calls for share in (0.2, 0.5, 0.8))
        return median, low, high

    def _timed(self, functions: Sequence[Callable[[], Any]], flush: bool) -> list[float]:
        events = []
        for function in functions:
            if flush:
                self._overwrite_cache()
            begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            events.append((begin, end))
        self.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def _overwrite_cache(self) -> None:
        if self._flush is None:
            size = 1 << 10 if self.dry else _FLUSH
            self._flush = torch.empty(size, dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def peak(self, function: Callable[[], Any]) -> int:
        """Bytes that ``function`` takes at most beyond what was there."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        function()
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() - before


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the block memory that was not written shows: it holds NaN, or the largest integer."""
    from .interpreter import replaced

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return made

    whole = {name: poisoning(getattr(torch, name)) for name in ("empty", "empty_like", "empty_strided")}
    own = {name: poisoning(getattr(torch.Tensor, name)) for name in ("new_empty", "new_empty_strided")}
    with replaced(torch, **whole), replaced(torch.Tensor, **own):
        yield
