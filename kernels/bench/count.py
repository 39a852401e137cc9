"""Count what every operation moves and computes at the model shapes, in Triton's interpreter.

Run as a process of its own, ``python -m interloom.kernels.bench.count``: kernels are interpreted only if
``TRITON_INTERPRET=1`` stands before they are defined. Prints one JSON object a line.

The sizes are the models' own. Where a grid is large, a few programs stand for all that do the same work
(every image of a batch, every head, every tile of a contrastive batch): they are run under their true indices
in the full-size launch, must agree in every count, and are multiplied by how many there are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import prod

import numpy as np
import torch

from ..common.arch import assume_architecture
from .interpreter import patched_interpreter
from .operation import Maker, Operation, Pass, Sizes, gradients_of, output_gradients, outputs_of
from .torch_traffic import TorchTraffic
from .traffic import CountedTraffic, Program, Sample, count_traffic

Eager = dict[Pass, tuple[int, int]]

_WHOLE = 64  # grids up to this are run whole


@dataclass(frozen=True)
class Count:
    """Bytes and operations of one pass of an operation at one model's sizes, with one target's tiles.

    ``moved`` are the bytes of the Triton kernels and of the PyTorch operators beside them, ``floor`` those
    that cannot be avoided, ``eager`` those of the plain PyTorch form; ``flops`` are those in ``tl.dot``,
    ``useful`` those of the definition, ``dense`` those of the plain PyTorch form.
    """

    operation: str
    model: str
    pass_: Pass
    target: str
    moved: int
    floor: int
    eager: int
    flops: int
    useful: int
    dense: int
    kernels: str


def sampler(copies: int | None) -> Callable[[str, Program], Sample | None]:
    """How to sample grids whose programs fall into ``copies`` equal stretches.

    None: programs along the first axis are equal, but for the last, which may be ragged.
    """

    def sample(name: str, grid: Program) -> Sample | None:
        x, y, z = grid
        total = prod(grid)
        if total <= _WHOLE:
            return None
        if copies is None:
            if x < 4:
                return None
            some = sorted({0, x - 2})
            columns = [(j, k) for k in range(z) for j in range(y)]
            inner = [([(i, j, k) for i in some], x - 1) for j, k in columns]
            return inner + [([(x - 1, j, k)], 1) for j, k in columns]
        stretch, rest = divmod(total, copies)
        if rest:
            return None

        def program(linear: int) -> Program:
            return linear % x, linear // x % y, linear // (x * y)

        checked = {0, stretch // 2, stretch - 1}
        return [
            ([program(i), program(i + total - stretch)] if i in checked else [program(i)], copies)
            for i in range(stretch)
        ]

    return sample


def count(operation: Operation, model: str, target: str) -> Iterator[Count]:
    """Count forward, then backward, of ``operation`` at the sizes of ``model`` with tiles for ``target``."""
    sizes = operation.models[model]
    sample = sampler(operation.copies(sizes) if operation.copies else None)
    inputs = operation.make(sizes, Maker(torch.bfloat16, blank=True))
    eager: Eager = {pass_: (moved, flops) for pass_, moved, flops in _count_eager(operation, sizes)}
    # Blank inputs hold anything; what is computed from them does not matter here.
    with assume_architecture(target), patched_interpreter(), np.errstate(all="ignore"):
        run = operation.call(inputs, "triton")
        with count_traffic(sample=sample) as forward, TorchTraffic() as beside:
            outputs = outputs_of(run())
        yield _row(operation, model, target, "forward", forward, beside, eager)
        grads = output_gradients(outputs, blank=True)
        with count_traffic(sample=sample) as backward, TorchTraffic() as beside:
            gradients_of(operation, inputs, outputs, grads)
        yield _row(operation, model, target, "backward", backward, beside, eager)


def _row(
    operation: Operation,
    model: str,
    target: str,
    pass_: Pass,
    traffic: CountedTraffic,
    beside: TorchTraffic,
    eager: Eager,
) -> Count:
    sizes = operation.models[model]
    return Count(
        operation=operation.name,
        model=model,
        pass_=pass_,
        target=target,
        moved=traffic.moved + beside.moved,
        floor=operation.floor(sizes, pass_),
        eager=eager[pass_][0],
        flops=traffic.flops,
        useful=operation.flops(sizes, pass_),
        dense=eager[pass_][1],
        kernels=" ".join(f"{name}:{kernel.moved}" for name, kernel in traffic.kernels.items()),
    )


def _count_eager(operation: Operation, sizes: Sizes) -> Iterator[tuple[Pass, int, int]]:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = operation.make(sizes, Maker(torch.bfloat16, "meta"))
    run = operation.eager(inputs)
    with TorchTraffic() as traffic, FlopCounterMode(display=False) as flops:
        outputs = outputs_of(run())
    yield "forward", traffic.moved, flops.get_total_flops()
    grads = output_gradients(outputs)
    with TorchTraffic() as traffic, FlopCounterMode(display=False) as flops:
        gradients_of(operation, inputs, outputs, grads)
    yield "backward", traffic.moved, flops.get_total_flops()


def counting_environment() -> dict[str, str]:
    """Environment of a process that counts."""
    return os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def main(arguments: list[str]) -> None:
    """``operation model target``, by their whole names."""
    from .operations import OPERATIONS

    name, model, target = arguments
    # Not select_cases: there a name stands for the operation's other forms too.
    (operation,) = (operation for operation in OPERATIONS if operation.name == name)
    for row in count(operation, model, target):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
