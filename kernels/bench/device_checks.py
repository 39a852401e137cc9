"""Whether the kernels are right on the device that is there, beyond what ``device_time.check`` asks.

Each check runs an operation another way that must not change a bit of its outputs and gradients: tensors laid out as
models have them, memory that was poisoned, twenty times over, on a side stream, on a second device while the first is
current, from a captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .device_time import check, reason_of, small_sizes, tiny_sizes
from .machine import Machine, poisoned_empty
from .operation import Inputs, Maker, Operation, gradients_of, output_gradients, outputs_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REPEATS = 20
Tensors = tuple[torch.Tensor, ...]
Row = dict[str, Any]


def checked_rows(operation: Operation, model: str, machine: Machine) -> Iterator[Row]:
    """One row a check and dtype: ``check``, ``dtype``, ``ok``, and what was found or why it could not be told."""
    sizes = tiny_sizes(operation, model) if machine.dry else small_sizes(operation, model)
    for dtype in DTYPES:
        case = _Case(operation, sizes, dtype, machine)
        for name, function in _CHECKS.items():
            if machine.dry and dtype != DTYPES[0] and name != "accuracy":
                continue  # the same lines again, which take the interpreter seconds
            row: Row = {
                "operation": operation.name,
                "model": model,
                "dtype": str(dtype).removeprefix("torch."),
            }
            row["check"] = name
            try:
                row |= function(case)
            except Exception as failure:
                row |= {"ok": False, "reason": reason_of(failure, machine)}
            yield row


class _Case:
    """An operation at one size and dtype, and what it gives when nothing is done to it."""

    def __init__(
        self, operation: Operation, sizes: dict[str, int], dtype: torch.dtype, machine: Machine
    ) -> None:
        self.operation, self.sizes, self.dtype, self.machine = operation, sizes, dtype, machine
        self._plain: Tensors | None = None

    def inputs(self, device: torch.device | None = None) -> Inputs:
        return self.operation.make(self.sizes, Maker(self.dtype, device or self.machine.device))

    def results(
        self, inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    ) -> Tensors:
        """Outputs and gradients; ``change`` lays the gradients of the outputs out another way."""
        outputs = outputs_of(self.operation.call(inputs, "triton")())
        grads = [change(grad) for grad in output_gradients(outputs)]
        return *outputs, *gradients_of(self.operation, inputs, outputs, grads)

    @property
    def plain(self) -> Tensors:
        if self._plain is None:
            self._plain = self.results(self.inputs())
        return self._plain

    def same(self, results: Tensors) -> Row:
        """Whether every bit is that of the plain run."""
        self.machine.cuda.synchronize()
        differing = [
            i for i, (a, b) in enumerate(zip(self.plain, results, strict=True)) if not torch.equal(a, b)
        ]
        return {"ok": not differing} | ({"differing": differing} if differing else {})


def _accuracy(case: _Case) -> Row:
    inputs = case.inputs()
    error = check(case.operation, inputs, case.operation.call(inputs, "triton"))
    return {"ok": error <= 1.0, "error": error}


def relaid(tensor: torch.Tensor) -> torch.Tensor:
    """The same values; [B, H, T, D] with heads inside, as a model's view of a projection, others in wider rows."""
    if tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if tensor.dim() < 2:
        return tensor
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def _layouts(case: _Case) -> Row:
    inputs = {
        name: relaid(value.detach()).requires_grad_() if _is_map(value) else value
        for name, value in case.inputs().items()
    }
    return case.same(case.results(inputs, relaid))


def _is_map(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _poisoned(case: _Case) -> Row:
    inputs = case.inputs()
    with poisoned_empty():
        results = case.results(inputs)
    return case.same(results)


def _repeated(case: _Case) -> Row:
    inputs = case.inputs()
    for _ in range(2 if case.machine.dry else _REPEATS):
        row = case.same(case.results(inputs))
        if not row["ok"]:
            return row
    return row


def _side_stream(case: _Case) -> Row:
    cuda, inputs = case.machine.cuda, case.inputs()
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        results = case.results(inputs)
    cuda.current_stream().wait_stream(stream)
    return case.same(results)


def _second_device(case: _Case) -> Row:
    if len(case.machine.devices) < 2:
        return {"ok": None, "reason": "there is one device"}
    results = case.results(case.inputs(case.machine.devices[1]))
    return case.same(tuple(x.to(case.machine.device) for x in results))


def _captured(case: _Case) -> Row:
    inputs = case.inputs()
    run = case.operation.call(inputs, "triton")
    leaves = [inputs[name] for name in case.operation.gradients]
    grads = output_gradients(outputs_of(run()))

    def step() -> Tensors:
        outputs = outputs_of(run())
        return *outputs, *torch.autograd.grad(outputs, leaves, grads)

    graph, results = case.machine.capture(step)
    graph.replay()
    return case.same(results)


_CHECKS: dict[str, Callable[[_Case], Row]] = {
    "accuracy": _accuracy,
    "model layouts": _layouts,
    "poisoned memory": _poisoned,
    "20 runs": _repeated,
    "side stream": _side_stream,
    "second device": _second_device,
    "graph capture": _captured,
}
