"""All operations of the harness, and choosing among them."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention, contrastive, grouping, residual
from .operation import Operation

OPERATIONS: tuple[Operation, ...] = (
    *attention.OPERATIONS,
    *residual.OPERATIONS,
    *grouping.OPERATIONS,
    *contrastive.OPERATIONS,
)


def select_cases(operation: str = "", model: str = "") -> Iterator[tuple[Operation, str]]:
    """Pairs of operation and model label; an empty name stands for all.

    Raises:
        ValueError: no case has that name.
    """
    names = [op.name for op in OPERATIONS]
    chosen = [op for op in OPERATIONS if operation in ("", op.name, op.name.split("/")[0])]
    if not chosen:
        raise ValueError(f"operation {operation!r} is not known; choose from {', '.join(names)}.")
    labels = [label for op in chosen for label in op.models if model in ("", label)]
    if not labels:
        known = sorted({label for op in chosen for label in op.models})
        raise ValueError(f"model {model!r} is not known here; choose from {', '.join(known)}.")
    yield from ((op, label) for op in chosen for label in op.models if model in ("", label))
