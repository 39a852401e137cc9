"""What the grouping and contrastive launches have in common."""

from __future__ import annotations

import torch

from ._arch import architecture


def launch_column(tensor: torch.Tensor) -> str:
    """The launch-table key for ``tensor``: as ``architecture``, with ``"sm_86"`` for all of that family but A100.

    The others allow a program 99 KB of shared memory where A100 allows 163 KB.
    """
    name = architecture(tensor)
    small = name == "sm_80" and tensor.device.type == "cuda"
    return "sm_86" if small and torch.cuda.get_device_capability(tensor.device) != (8, 0) else name


def dot_precision(tensor: torch.Tensor) -> str:
    """``tl.dot``'s input_precision: float32 products stay exact to float32 unless torch was told tf32 will do."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if architecture(tensor).startswith("sm_") else "ieee"
