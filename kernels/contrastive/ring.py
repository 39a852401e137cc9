"""Rings of ranks for the contrastive losses: text blocks travel, every rank meets every other's texts once.

Each rank keeps its images and passes on a block of texts together with what belongs to that block: the running
log-sum-exp of its columns forward, the gradient of its texts backward. The last to add to it sends it home, where
what its own rank found is added. A rank holds at most two blocks at a time, so its memory is that of its own share.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group


def ring_length(group_name: str) -> int:
    """The number of ranks in the group of that name; 1 for an empty name."""
    return dist.get_world_size(_resolve_process_group(GroupName(group_name))) if group_name else 1


class Ring:
    """The ranks of a process group in a circle; with an empty ``group_name`` a circle of one.

    ``sizes`` are the rows [M] each rank holds: ``rows`` here, exchanged, so all ranks make the ring together; or all
    of them, from an earlier ring of the same group.
    """

    def __init__(self, group_name: str, rows: int | list[int], device: torch.device) -> None:
        self.group = _resolve_process_group(GroupName(group_name)) if group_name else None
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world = ring_length(group_name)
        if isinstance(rows, list):
            self.sizes = rows
        elif self.world == 1:
            self.sizes = [rows]
        else:
            counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(self.world)]
            dist.all_gather(counts, torch.tensor([rows], device=device), group=self.group)
            self.sizes = torch.cat(counts).tolist()
        self.total = sum(self.sizes)

    def start(self, rank: int) -> int:
        """Index among all rows of the first row of ``rank``."""
        return sum(self.sizes[:rank])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the ranks, the same on each."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' ``tensor`` [M, ...] one after another: [sum of M, ...]. For labels, not for features."""
        if self.world == 1:
            return tensor
        largest = max(self.sizes)
        padded = tensor.new_zeros((largest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def send_on(self, tensor: torch.Tensor, source: int) -> Passing:
        """Start passing a block to the next rank and receiving the previous rank's.

        ``source`` is the rank whose block this is; the one received is that of the rank before ``source``.
        """
        size, received_size = self.sizes[source], self.sizes[(source - 1) % self.world]
        shape = (tensor.shape[0] // max(size, 1) * received_size, *tensor.shape[1:])
        return Passing(self, tensor.contiguous(), tensor.new_empty(shape))


class Passing:
    """A block on its way; :meth:`wait` gives the one received."""

    def __init__(self, ring: Ring, sent: torch.Tensor, received: torch.Tensor) -> None:
        self._sent, self._received = sent, received
        peers = [(ring.rank + 1) % ring.world, (ring.rank - 1) % ring.world]
        assert ring.group is not None
        to, source = (dist.get_global_rank(ring.group, peer) for peer in peers)
        self._work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, to, ring.group),
                dist.P2POp(dist.irecv, received, source, ring.group),
            ]
        )

    def wait(self) -> torch.Tensor:
        for work in self._work:
            work.wait()
        return self._received
