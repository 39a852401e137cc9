"""Bytes that PyTorch's own operators move, counted without computing: tensors may be on the device meta."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that allocate or alias and move nothing. Views are told by their schema.
_FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::set_",
    "aten::_unsafe_view",
    "aten::lift_fresh",
}


class TorchTraffic(TorchDispatchMode):
    """Within the block, add up what every operator reads and writes: each argument once, each result once.

    A fused operator (attention, a norm) counts as one, which flatters it: its workspace is not seen. Inside
    this library's own operations the plain operators are counted, the Triton kernels are not.

    Attributes:
        moved: bytes read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "interloom":
            device = next(
                leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            )
            key = torch._C._parse_dispatch_key("Meta" if device.type == "meta" else device.type.upper())
            with self:
                return func.redispatch(torch._C.DispatchKeySet(cast(Any, key)), *args, **kwargs)
        result = func(*args, **kwargs)
        if not func.is_view and func._schema.name not in _FREE:
            read = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(_bytes(tensor) for tensor in read.values()) + sum(map(_bytes, written))
        return result


def _bytes(tensor: torch.Tensor) -> int:
    # A broadcast tensor is smaller in memory than its shape says.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
