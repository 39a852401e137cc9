"""Which implementation of an operation runs: the Triton kernels or plain PyTorch."""

from __future__ import annotations

import os
from typing import Literal, cast

import torch

from ._arch import assumed_architecture

Backend = Literal["triton", "torch"]


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``), hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on"}


def resolve_backend(backend: str, tensor: torch.Tensor) -> Backend:
    """Return ``"triton"`` or ``"torch"`` for an operation on ``tensor``.

    ``"auto"`` is Triton on a GPU and PyTorch elsewhere, unless ``INTERLOOM_KERNELS`` names one.

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
        return "triton" if tensor.device.type == "cuda" else "torch"
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
    return cast(Backend, backend)


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
