"""Which implementation of an operation runs: the Triton kernels or plain PyTorch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeVar, cast

import torch
from torch.autograd import forward_ad

from .arch import assumed_architecture

Backend = Literal["triton", "torch"]
Function = TypeVar("Function", bound=Callable[..., Any])


def outside_autocast(function: Function) -> Function:
    """Run the body of an operator, forward or backward, in the precision that it asks for.

    A caller's autocast still rules inside an operator: it would round every product that was cast up on purpose, and
    hand matrices of two types to one product. The first argument says which device's autocast.
    """

    @functools.wraps(function)
    def exact(tensor: torch.Tensor, *arguments: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *arguments)

    return cast(Function, exact)


def refuse_forward_mode(name: str, *tensors: torch.Tensor) -> None:
    """Raise where a tensor carries a forward-mode tangent, which an operator would drop: its derivative came out 0.

    Raises:
        ValueError: one does.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise ValueError(
            f"{name} has no forward-mode derivative (torch.func.jvp, forward_ad); use reverse mode "
            f"(torch.autograd.grad, torch.func.vjp), or {name}_reference."
        )


LEAST_CAPABILITY = (8, 0)
"""Older GPUs have neither bfloat16 nor the shared memory that the tiles take."""


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``), hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}


def resolve_backend(backend: str, tensor: torch.Tensor) -> Backend:
    """Return ``"triton"`` or ``"torch"`` for an operation on ``tensor``.

    ``"auto"`` is Triton on a GPU and PyTorch elsewhere, unless ``INTERLOOM_KERNELS`` names one. A GPU that the
    kernels are not made for gets PyTorch, with one line in the log.

    Raises:
        ValueError: ``backend`` or ``INTERLOOM_KERNELS`` is unknown, or Triton is asked for on a tensor that
            it cannot reach.
    """
    if backend == "auto":
        backend = os.environ.get("INTERLOOM_KERNELS", "auto")
        if backend not in {"auto", "triton", "torch"}:
            raise ValueError(
                f"INTERLOOM_KERNELS={backend!r} is not known; set it to triton or torch, or unset it."
            )
    if backend == "auto":
        backend = "triton" if tensor.device.type == "cuda" else "torch"
    if backend not in {"triton", "torch"}:
        raise ValueError(f"backend={backend!r} is not known; use 'auto', 'triton' or 'torch'.")
    # Asked only where it matters: a compiler cannot trace what reads a context variable.
    if backend == "triton" and not (
        tensor.device.type == "cuda" or interpreting() or assumed_architecture() is not None
    ):
        raise ValueError(
            f"backend='triton' was given a tensor on {tensor.device}; move it to a GPU, use backend='torch', "
            "or set TRITON_INTERPRET=1 before the first import to run the kernels in Triton's interpreter."
        )
    if backend == "triton" and tensor.device.type == "cuda" and assumed_architecture() is None:
        capability = _capability(tensor.device)
        if capability is not None and capability < LEAST_CAPABILITY:
            return fall_back(
                f"this GPU has compute capability {capability[0]}.{capability[1]} and the kernels need 8.0 or newer"
            )
    return cast(Backend, backend)


def backend_for(backend: str, name: str, tensor: torch.Tensor) -> Backend:
    """As :func:`resolve_backend`, with the one rule for float64: it is for checking, so PyTorch computes it.

    Raises:
        ValueError: as there; or Triton is asked for by name for the float64 argument ``name``.
    """
    if tensor.dtype == torch.float64 and backend == "auto":
        return "torch"
    resolved = resolve_backend(backend, tensor)
    if resolved == "triton" and tensor.dtype == torch.float64:
        raise ValueError(
            f"{name} is float64, which the Triton kernels do not take; use float32 or backend='torch'."
        )
    return resolved


def autocast_inputs(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast the tensors in its dtype, but for float64, which is for checking; else as they are.

    The first says the device, and whether they are float64.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


@cache
def fall_back(reason: str) -> Backend:
    """Return ``"torch"``; the first time for each ``reason``, log it."""
    logging.getLogger("interloom.kernels").warning("PyTorch stands in for the Triton kernels: %s.", reason)
    return "torch"


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA device; None elsewhere, and while a device is only being imagined."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def calls_directly(triton: bool, tensor: torch.Tensor) -> bool:
    """Whether an operation may call its PyTorch code itself, for there is nothing to differentiate or to trace.

    The first call of a registered operator on the CPU imports PyTorch's compiler (seconds, and some 100 MB), and
    every call costs tens of microseconds: much beside the small tensors of one decoding step.
    """
    return (
        not triton
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )
