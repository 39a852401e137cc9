"""How often the host waits for a device, counted as PyTorch dispatches: on a GPU, or on a CPU that stands for one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result the host must know before it goes on: a number, or a shape that depends on values.
_READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class Synchronisations(TorchDispatchMode):
    """Within the block, count the operators that make the host wait for a GPU.

    That is: reading a value, a shape that depends on values, and copies between host and device (from memory that is
    not pinned even one that is called non-blocking is staged). What a kernel's own launcher waits for is not seen.

    Args:
        imagined: count on the CPU what would be such on a GPU: a tensor made from Python's numbers is then a copy.

    Attributes:
        seen: name of operator to how often.
    """

    def __init__(self, *, imagined: bool = False) -> None:
        super().__init__()
        self.imagined = imagined
        self.seen: dict[str, int] = {}

    @property
    def count(self) -> int:
        return sum(self.seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        # The first tensor is what is indexed, the last what came out.
        by_mask = name == "aten::index" and any(x.dtype == torch.bool for x in tensors[1:-1])
        if self.imagined:
            waits = name in _READS or by_mask or name == "aten::lift_fresh"
        else:
            waits = "cuda" in kinds and (name in _READS or by_mask or (name in _COPIES and len(kinds) > 1))
        if waits:
            self.seen[name] = self.seen.get(name, 0) + 1
        return result
