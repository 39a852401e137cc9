"""Times and memory on the GPU that is there, against eager PyTorch, ``torch.compile`` and rival operators.

Nothing is called faster before it is shown to be right: outputs and gradients of the kernels are first compared
with the float64 definition, and no speed-up is given if one of them is further from it than twice the error of
this library's PyTorch path in the same dtype, plus rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch

from .operation import Inputs, Maker, Operation, Pass, Run, gradients_of, output_gradients, outputs_of

OURS = "interloom"


@dataclass(frozen=True)
class Timing:
    """One implementation of one pass.

    Times are in milliseconds: the median, the 20th and the 80th percentile. ``tflops`` and ``gbytes`` are the
    useful work and the floor of the bytes per second; ``peak_bytes`` the most memory taken beyond inputs.
    ``error`` is the largest error ratio of our kernels' check, at most 1 if they are right; ``ours_faster`` how
    many times faster they are than this implementation, None for themselves and if they are not right.
    """

    operation: str
    model: str
    pass_: Pass
    implementation: str
    median_ms: float
    low_ms: float
    high_ms: float
    tflops: float
    gbytes: float
    peak_bytes: int
    error: float
    ours_faster: float | None
    device: str


def with_speedups(timings: Iterable[Timing]) -> list[Timing]:
    """Fill in ``ours_faster`` where our kernels were timed for the same pass and passed their check."""
    rows = list(timings)
    ours = {row.pass_: row for row in rows if row.implementation == OURS}

    def faster(row: Timing) -> float | None:
        if row.implementation == OURS or row.pass_ not in ours or not ours[row.pass_].error <= 1.0:
            return None
        return row.median_ms / ours[row.pass_].median_ms

    return [replace(row, ours_faster=faster(row)) for row in rows]


def error_ratio(result: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of ``result`` over what is allowed: twice that of ``plain`` plus two roundings of ``exact``.

    All are of one shape; ``exact`` is float64. NaN anywhere in ``result`` gives infinity.
    """
    error = (result.double() - exact).abs().max()
    rounding = (exact.to(result.dtype).double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2 * rounding + torch.finfo(torch.float32).tiny
    ratio = (error / allowed).item()
    return ratio if ratio == ratio else float("inf")


def check(operation: Operation, inputs: Inputs, run: Run) -> float:
    """Largest :func:`error_ratio` over the outputs and gradients of ``run``; at most 1 if they are right."""
    exact_inputs = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    exact = outputs_of(operation.reference(exact_inputs)())
    grads = output_gradients(exact)
    values: list[tuple[torch.Tensor, ...]] = [(*exact, *gradients_of(operation, exact_inputs, exact, grads))]
    for candidate in (run, operation.call(inputs, "torch")):
        outputs = outputs_of(candidate())
        same = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
        values.append((*outputs, *gradients_of(operation, inputs, outputs, same)))
    return max(error_ratio(ours, plain, true) for true, ours, plain in zip(*values, strict=True))


def time_case(
    operation: Operation, model: str, *, dtype: torch.dtype = torch.bfloat16, budget_ms: int = 200
) -> list[Timing]:
    """Check the kernels, then time every implementation at the sizes of ``model`` on the current GPU.

    Implementations that run out of memory are left out.
    """
    small = operation.make(small_sizes(operation, model), Maker(dtype, "cuda"))
    error = check(operation, small, operation.call(small, "triton"))
    del small
    sizes = operation.models[model]
    inputs = operation.make(sizes, Maker(dtype, "cuda"))
    builders: dict[str, Callable[[], Run]] = {
        OURS: lambda: operation.call(inputs, "triton"),
        "eager": lambda: operation.eager(inputs),
        "torch.compile": lambda: torch.compile(operation.eager(inputs), dynamic=False),
    }
    builders |= {name: (lambda run=run: run) for name, run in operation.rivals(inputs).items()}
    rows = []
    for name, build in builders.items():
        try:
            measured = list(_time(operation, inputs, build(), budget_ms))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        for pass_, (median, low, high), peak in measured:
            timing = Timing(
                operation=operation.name,
                model=model,
                pass_=pass_,
                implementation=name,
                median_ms=median,
                low_ms=low,
                high_ms=high,
                tflops=operation.flops(sizes, pass_) / median / 1e9,
                gbytes=_least_bytes(inputs, operation, pass_) / median / 1e6,
                peak_bytes=peak,
                error=error,
                ours_faster=None,
                device=torch.cuda.get_device_name(),
            )
            rows.append(timing)
    return with_speedups(rows)


def small_sizes(operation: Operation, model: str) -> dict[str, int]:
    """The sizes of ``model`` with batch (and sequence) cut so that a float64 reference with all maps fits."""
    sizes = dict(operation.models[model])
    for name, most in (("B", 2), ("H", 4), ("M", 2048)):
        if name in sizes:
            sizes[name] = min(sizes[name], most)
    return sizes


def _time(
    operation: Operation, inputs: Inputs, run: Run, budget_ms: int
) -> Iterator[tuple[Pass, tuple[float, float, float], int]]:
    from triton.testing import do_bench

    quantiles = [0.5, 0.2, 0.8]
    leaves = [inputs[name] for name in operation.gradients]
    outputs = outputs_of(run())  # compile before anything is measured
    grads = output_gradients(outputs)

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    backward()
    passes: tuple[tuple[Pass, Callable[[], object]], ...] = (("forward", run), ("backward", backward))
    for pass_, function in passes:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        median, low, high = cast(list[float], do_bench(function, rep=budget_ms, quantiles=quantiles))
        yield pass_, (median, low, high), peak


def _least_bytes(inputs: Inputs, operation: Operation, pass_: Pass) -> int:
    """Bytes of the inputs with gradients: once forward, twice backward, where each is read and one written."""
    size = sum(inputs[name].numel() * inputs[name].element_size() for name in operation.gradients)
    return size * (1 if pass_ == "forward" else 2)
