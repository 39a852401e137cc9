"""What ``bytes_moved`` of an operation's ``launch`` answers: bytes by kernel, and the least that they can be."""

from __future__ import annotations

from typing import NamedTuple


class Floor(NamedTuple):
    """Bytes that cannot be avoided with the tiling at hand, forward and backward; each ``bytes_moved`` says which."""

    forward: int
    backward: int


class Traffic(NamedTuple):
    """Bytes that kernels load and store with no cache in between: what a tile needs again counts again.

    Attributes:
        forward, backward: name of a kernel to its bytes, over all its launches; kernels that move nothing are absent.
        floor: the least there is to move.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    floor: Floor

    @property
    def moved_forward(self) -> int:
        """Bytes of the forward pass, all kernels together."""
        return sum(self.forward.values())

    @property
    def moved_backward(self) -> int:
        """Bytes of the backward pass, all kernels together."""
        return sum(self.backward.values())


def float32_sum_bytes(parts: int, elements: int, element_bytes: int) -> int:
    """Bytes of adding ``parts`` float32 partial results of ``elements`` each: all read, the sum written."""
    return elements * (4 * parts + element_bytes)
