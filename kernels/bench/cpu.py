"""Measurements on the CPU: the PyTorch paths of the operations against the dense forms.

Each runs in a process of its own, ``python -m interloom.kernels.bench.cpu NAME``, which prints one JSON object.
Two implementations are timed side by side, in turn, and compared by their medians; memory is the peak resident
size of the process beyond what it had with the inputs made.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from . import attention, contrastive
from .contest import in_turn, peak_bytes, reset_peak, resident_bytes
from .operation import Maker, Operation, Run, Sizes, gradients_of, output_gradients, outputs_of


def _both_passes(operation: Operation, inputs: dict[str, Any], run: Run) -> Callable[[], None]:
    grads = output_gradients(outputs_of(run()))

    def both() -> None:
        gradients_of(operation, inputs, outputs_of(run()), grads)

    return both


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _extra_memory(function: Callable[[], None]) -> int:
    """Bytes of peak resident memory that ``function`` needs beyond what the process has now."""
    reset_peak()
    before = resident_bytes()
    function()
    return peak_bytes() - before


@contextmanager
def _progress(what: str, every: float = 30.0) -> Iterator[None]:
    """While the body runs, say on stderr every ``every`` seconds how long it has, and the memory it holds."""
    done, start = threading.Event(), time.perf_counter()

    def report() -> None:
        while not done.wait(every):
            held = resident_bytes() / 1e6
            print(f"{what}: {time.perf_counter() - start:.0f} s, {held:,.0f} MB resident", file=sys.stderr)

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def _make(operation: Operation, sizes: Sizes) -> dict[str, Any]:
    return operation.make(sizes, Maker(torch.float32))


def contrastive_memory(batch: int = 65536) -> dict[str, Any]:
    """Extra memory of the tiled contrastive loss, forward and backward, at ``batch`` × 256 in float32."""
    operation = contrastive.OPERATIONS[0]
    inputs = _make(operation, {"M": batch, "K": 1, "D": 256})
    warm = _make(operation, {"M": 512, "K": 1, "D": 256})
    _both_passes(operation, warm, operation.call(warm, "torch"))()
    run = operation.call(inputs, "torch")
    grads = [torch.ones(())]

    def both() -> None:
        with _progress("forward"):
            outputs = outputs_of(run())
        with _progress("backward"):
            gradients_of(operation, inputs, outputs, grads)

    start = time.perf_counter()
    extra = _extra_memory(both)
    return {
        "case": f"contrastive_loss, batch {batch:,} × 256, forward and backward",
        "extra_bytes": extra,
        "gradient_bytes": 2 * inputs["image"].numel() * 4,
        "logits_bytes": batch * batch * 4,
        "seconds": time.perf_counter() - start,
    }


def contrastive_speed(batch: int = 8192, rounds: int = 5) -> dict[str, Any]:
    """The tiled contrastive loss against the dense one, forward and backward, float32."""
    operation = contrastive.OPERATIONS[0]
    inputs = _make(operation, {"M": batch, "K": 1, "D": 256})
    tiled = _both_passes(operation, inputs, operation.call(inputs, "torch"))
    dense = _both_passes(operation, inputs, operation.eager(inputs))
    return _compared(f"contrastive_loss, batch {batch:,} × 256, against dense", tiled, dense, rounds)


def attention_speed(rounds: int = 5) -> dict[str, Any]:
    """Cross-attention to 8 images, one a token, T = 2048, against SDPA with the dense mask, float32."""
    operation = attention.OPERATIONS[0]
    inputs = _make(operation, {"B": 1, "H": 8, "T": 2048, "N": 8, "L": 64, "D": 128})
    compact = _both_passes(operation, inputs, operation.call(inputs, "torch"))
    dense = _both_passes(operation, inputs, attention.sdpa(inputs))
    case = "gated_cross_attention, 8 images, T = 2048, against SDPA, dense mask"
    return _compared(case, compact, dense, rounds)


def _compared(
    case: str, compact: Callable[[], None], dense: Callable[[], None], rounds: int
) -> dict[str, Any]:
    """Medians of runs in turn; the first of each warms up."""
    sides = {"compact": lambda: _seconds(compact), "dense": lambda: _seconds(dense)}
    ours, theirs = (median(seconds) for seconds in in_turn(sides, rounds, warm_up=1).values())
    return {"case": case, "seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours, "rounds": rounds}


CASES = {
    "contrastive_memory": contrastive_memory,
    "contrastive_speed": contrastive_speed,
    "attention_speed": attention_speed,
}


if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]() | {"threads": torch.get_num_threads()}))
