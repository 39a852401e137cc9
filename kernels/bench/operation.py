"""What the harness knows of an operation: its model shapes, its inputs, its rivals and its lower bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Pass = Literal["forward", "backward", "both"]
Sizes = Mapping[str, int]
Inputs = dict[str, Any]
Run = Callable[[], "torch.Tensor | tuple[torch.Tensor, ...]"]


class Maker:
    """Makes the tensors of a case: on one device, in one dtype, the same whenever it is made anew."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", *, blank: bool = False
    ) -> None:
        """With ``blank``, and always on the device meta, values are left uninitialised."""
        self.dtype = dtype
        self.device = torch.device(device)
        self.blank = blank or self.device.type == "meta"
        self._drawn = 0

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values of standard deviation ``scale`` that need a gradient."""
        if self.blank:
            return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=True)
        self._drawn += 1
        generator = torch.Generator(self.device).manual_seed(self._drawn)
        values = torch.randn(shape, generator=generator, device=self.device) * scale
        return values.to(self.dtype).requires_grad_()


@dataclass(frozen=True)
class Operation:
    """One public operation of ``interloom.kernels`` as the harness runs it.

    Attributes:
        name: the public function, e.g. ``"group_assign"``; a variant stands behind a slash.
        models: shape label to sizes.
        make: sizes, maker of tensors -> named inputs.
        gradients: the inputs that receive gradients.
        call: inputs, backend -> a run of this library's operation.
        eager: inputs -> a run of the same in plain PyTorch, as models are commonly written.
        reference: inputs -> the definition; inputs may be float64.
        floor: sizes, pass -> bytes that cannot be avoided in bfloat16 with the tiling of the architecture that is
            assumed; the floor of the operation's ``bytes_moved``, see ``floor_is``.
        flops: sizes, pass -> useful floating-point operations in matrix products.
        rivals: further runs to time against on a GPU, by name: inputs -> a run.
        copies: into how many consecutive stretches that do the same work a grid divides (batch times heads),
            so that counting may run two of them; None if all programs of a kernel do the same.
        matrix: whether the kernels multiply matrices, and so must use tensor cores.
        floor_is: one line: what the floor consists of.
    """

    name: str
    models: dict[str, Sizes]
    make: Callable[[Sizes, Maker], Inputs]
    gradients: tuple[str, ...]
    call: Callable[[Inputs, str], Run]
    eager: Callable[[Inputs], Run]
    reference: Callable[[Inputs], Run]
    floor: Callable[[Sizes, Pass], int]
    flops: Callable[[Sizes, Pass], int]
    rivals: Mapping[str, Callable[[Inputs], Run]] = field(default_factory=dict)
    copies: Callable[[Sizes], int] | None = None
    matrix: bool = True
    floor_is: str = "each input read once, each output written once"


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a run returned, as a tuple."""
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(tensor for tensor in result if tensor is not None)


def output_gradients(outputs: tuple[torch.Tensor, ...], *, blank: bool = False) -> list[torch.Tensor]:
    """Reproducible normal gradients for outputs, one for a scalar loss; with ``blank`` uninitialised."""
    return [_output_gradient(output, blank or output.device.type == "meta") for output in outputs]


def _output_gradient(output: torch.Tensor, blank: bool) -> torch.Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    if blank:
        return torch.empty_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator, device=output.device)
    return gradient.to(output.dtype)


def gradients_of(
    operation: Operation,
    inputs: Inputs,
    outputs: tuple[torch.Tensor, ...],
    output_grads: list[torch.Tensor],
    *,
    retain_graph: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Gradients of the inputs that ``operation.gradients`` names."""
    leaves = [inputs[name] for name in operation.gradients]
    return torch.autograd.grad(outputs, leaves, output_grads, retain_graph=retain_graph)
