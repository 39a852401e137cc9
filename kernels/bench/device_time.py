"""Times and memory on the GPU that is there, against eager PyTorch, ``torch.compile`` and rival operators.

Nothing is called faster before it is shown to be right: outputs and gradients of the kernels are first compared
with the float64 definition, and no speed-up is given if one of them is further from it than twice the error of
this library's PyTorch path in the same dtype, plus rounding.

Every implementation is timed twice: in plain calls, where below 0.2 ms the host is what is measured, and in a CUDA
graph, which holds several calls and leaves the host out. Inputs take turns. A rival that raises gives a row that says
why, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from .machine import Machine
from .operation import Inputs, Maker, Operation, Pass, Run, Sizes, gradients_of, output_gradients, outputs_of

OURS = "interloom"
_IN_A_GRAPH = 8  # calls


@dataclass(frozen=True)
class Timing:
    """One implementation of one pass.

    Times are in milliseconds: the median, the 20th and the 80th percentile. ``tflops`` and ``gbytes`` are the
    useful work and the floor of the bytes per second; ``peak_bytes`` the most memory taken beyond inputs.
    ``error`` is the largest error ratio of our kernels' check, at most 1 if they are right; ``ours_faster`` how
    many times faster they are than this implementation, None for themselves and if they are not right. ``mode`` is
    ``"calls"`` or ``"graph"``.
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
    mode: str = "calls"


@dataclass(frozen=True)
class Failure:
    """An implementation that could not be built or timed, and the first line of why."""

    operation: str
    model: str
    implementation: str
    mode: str
    reason: str
    device: str


def with_speedups(timings: Iterable[Timing]) -> list[Timing]:
    """Fill in ``ours_faster`` where our kernels were timed for the same pass and passed their check."""
    rows = list(timings)
    ours = {(row.pass_, row.mode): row for row in rows if row.implementation == OURS}

    def faster(row: Timing) -> float | None:
        own = ours.get((row.pass_, row.mode))
        if row.implementation == OURS or own is None or not own.error <= 1.0:
            return None
        return row.median_ms / own.median_ms

    return [replace(row, ours_faster=faster(row)) for row in rows]


def error_ratio(result: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error of ``result`` over what is allowed: twice that of ``plain`` plus two roundings of ``exact``.

    All are of one shape; ``exact`` is float64. A single number is allowed 4 units in the last place of float32 at
    least. NaN anywhere in ``result`` gives infinity.
    """
    error = (result.double() - exact).abs().max()
    rounding = (exact.to(result.dtype).double() - exact).abs().max()
    usual = (plain.double() - exact).abs().max()
    if exact.numel() == 1:
        # A sum whose rounding errors happen to cancel in one order is no measure for another.
        usual = usual.clamp(min=2 * torch.finfo(torch.float32).eps * float(exact.abs()))
    allowed = 2 * usual + 2 * rounding + torch.finfo(torch.float32).tiny
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

    Implementations that fail are left out.
    """
    rows = timed_rows(operation, model, Machine(), dtype=dtype, budget_ms=budget_ms)
    return [row for row in rows if isinstance(row, Timing)]


def timed_rows(
    operation: Operation,
    model: str,
    machine: Machine,
    *,
    dtype: torch.dtype = torch.bfloat16,
    budget_ms: float = 200,
) -> Iterator[Timing | Failure]:
    """The rows of :func:`time_case` as they are measured, our own first, and those of what failed."""
    sizes = tiny_sizes(operation, model) if machine.dry else operation.models[model]
    failed = partial(Failure, operation.name, model, device=machine.name)
    try:
        small = operation.make(
            sizes if machine.dry else small_sizes(operation, model), Maker(dtype, machine.device)
        )
        error = check(operation, small, operation.call(small, "triton"))
        del small
        copies = [operation.make(sizes, Maker(dtype, machine.device)) for _ in range(2)]
    except Exception as failure:
        yield failed("check", "calls", reason_of(failure, machine))
        error, copies = float("inf"), [operation.make(sizes, Maker(dtype, machine.device))]
    ours: dict[tuple[Pass, str], Timing] = {}
    for name, build in _implementations(operation).items():
        build = _once(build)
        for mode, measure in (("calls", _time_calls), ("graph", _time_in_a_graph)):
            try:
                measured = list(measure(operation, copies, build, machine, budget_ms))
            except Exception as failure:
                # Out of memory among them; a failed capture leaves the device usable.
                machine.cuda.empty_cache()
                yield failed(name, mode, reason_of(failure, machine))
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
                    tflops=_useful(operation.flops, sizes, pass_) / median / 1e9,
                    gbytes=_least_bytes(copies[0], operation, pass_) / median / 1e6,
                    peak_bytes=peak,
                    error=error,
                    ours_faster=None,
                    device=machine.name,
                    mode=mode,
                )
                if name == OURS:
                    ours[pass_, mode] = timing
                elif (own := ours.get((pass_, mode))) is not None:
                    timing = with_speedups([own, timing])[1]
                yield timing


def reason_of(failure: BaseException, machine: Machine) -> str:
    """One line of what went wrong."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]


Build = Callable[[Inputs], Run]


def _implementations(operation: Operation) -> dict[str, Build]:
    """How each is built for given inputs, ours first."""
    return {
        OURS: lambda inputs: operation.call(inputs, "triton"),
        "eager": operation.eager,
        **operation.rivals,
        "torch.compile": lambda inputs: torch.compile(operation.eager(inputs), dynamic=False),
    }


def _once(build: Build) -> Build:
    """Build for the same inputs once: ``torch.compile`` takes seconds."""
    built: dict[int, Run] = {}

    def get(inputs: Inputs) -> Run:
        if id(inputs) not in built:
            built[id(inputs)] = build(inputs)
        return built[id(inputs)]

    return get


def small_sizes(operation: Operation, model: str) -> dict[str, int]:
    """The sizes of ``model`` with batch (and sequence) cut so that a float64 reference with all maps fits."""
    return _cut(operation.models[model], {"B": 2, "H": 4, "M": 2048})


def tiny_sizes(operation: Operation, model: str) -> dict[str, int]:
    """The sizes of ``model`` cut down to what the interpreter runs in a fraction of a second."""
    most = {"B": 1, "H": 1, "T": 24, "N": 2, "L": 8, "D": 16, "C": 16, "A": 16, "G": 4, "M": 12, "K": 2}
    return _cut(operation.models[model], most)


def distinct_sizes(operation: Operation) -> list[dict[str, int]]:
    """:func:`small_sizes` of all its models, each once: many differ in what is cut alone."""
    found: list[dict[str, int]] = []
    for model in operation.models:
        sizes = small_sizes(operation, model)
        if sizes not in found:
            found.append(sizes)
    return found


def _cut(sizes: Sizes, most: dict[str, int]) -> dict[str, int]:
    return {name: min(size, most.get(name, size)) for name, size in sizes.items()}


Measured = tuple[Pass, tuple[float, float, float], int]


def _steps(operation: Operation, copies: list[Inputs], build: Build) -> Iterator[tuple[Run, Run, Run]]:
    """(forward, backward alone, both) for each of the inputs."""
    for inputs in copies:
        run = build(inputs)
        leaves = [inputs[name] for name in operation.gradients]
        outputs = outputs_of(run())  # compiles before anything is measured
        grads = output_gradients(outputs)

        def backward(outputs=outputs, leaves=leaves, grads=grads):
            return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        def both(run=run, leaves=leaves, grads=grads):
            return torch.autograd.grad(outputs_of(run()), leaves, grads)

        yield run, backward, both


def _time_calls(
    operation: Operation, copies: list[Inputs], build: Build, machine: Machine, budget_ms: float
) -> Iterator[Measured]:
    forwards, backwards, _ = zip(*_steps(operation, copies, build), strict=True)
    passes: tuple[tuple[Pass, tuple[Run, ...]], ...] = (("forward", forwards), ("backward", backwards))
    for pass_, functions in passes:
        functions[0]()
        peak = machine.peak(functions[0])
        yield pass_, machine.measure(functions, budget_ms), peak


def _time_in_a_graph(
    operation: Operation, copies: list[Inputs], build: Build, machine: Machine, budget_ms: float
) -> Iterator[Measured]:
    """Forward, and forward with backward: of a backward alone the forward would have to be in another graph."""
    forwards, _, boths = zip(*_steps(operation, copies, build), strict=True)
    calls = 1 if machine.dry else _IN_A_GRAPH
    passes: tuple[tuple[Pass, tuple[Run, ...]], ...] = (("forward", forwards), ("both", boths))
    for pass_, functions in passes:

        def several(functions=functions):
            for i in range(calls):
                functions[i % len(functions)]()

        graph, _ = machine.capture(several)
        yield pass_, machine.measure([graph.replay], budget_ms, calls=calls, flush=False), 0


def _useful(flops: Callable[[Sizes, Pass], int], sizes: Sizes, pass_: Pass) -> int:
    return flops(sizes, pass_) if pass_ != "both" else flops(sizes, "forward") + flops(sizes, "backward")


def _least_bytes(inputs: Inputs, operation: Operation, pass_: Pass) -> int:
    """Bytes of the inputs with gradients: once forward, twice backward, where each is read and one written."""
    size = sum(inputs[name].numel() * inputs[name].element_size() for name in operation.gradients)
    return size * {"forward": 1, "backward": 2, "both": 3}[pass_]
