"""An exponential moving average of the weights (EMA; Polyak and Juditsky, 1992), in shards where the weights are.

Lightning's ``WeightAveraging`` copies the whole module, frozen towers included, and cannot copy shards; this keeps one
tensor for each one that training changes. The arithmetic is ``torch.optim.swa_utils``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .clipping import own_part

# A checkpoint's entry, and what is in it.
AVERAGE, UPDATES, TENSORS = "average", "updates", "tensors"
Fill = Callable[[dict[str, Tensor], dict[str, Tensor]], None]


class WeightAverage:
    """The average of a module's trained parameters and of its floating-point buffers (batch statistics).

    The update number n (0 for the first) keeps ``min(decay, (1 + n) / (10 + n))`` of the average, so that the weights
    a run began with are soon forgotten (as TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``).

    Attributes:
        decay: what an update keeps at most.
        updates: how many there were.
        tensors: the averages by the names of the module's ``state_dict``; a tied weight has its tensor under each of
            its names. A shard's average is a shard. Empty before :meth:`begin`.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._saved: dict[str, Tensor] | None = None

    def begin(self, module: nn.Module, fill: Fill) -> None:
        """Begin with what :meth:`resume` was given, else with the weights of now; a second call does nothing.

        Every rank must call it.

        Args:
            module: with its weights in place, on the device where it stays.
            fill: copies saved tensors into own ones of the same names, those of a sharded checkpoint.
        """
        if self.tensors:
            return
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for name, source in averaged(module).items():
            if id(source) not in copies:
                copies[id(source)] = source, source.detach().clone()
            self.tensors[name] = copies[id(source)][1]
        self._pairs = list(copies.values())
        if self._saved is not None:
            fill(_prefixed(self.tensors), _prefixed(self._saved))
            self._saved = None

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        sources = [own_part(source.detach()) for source, _ in self._pairs]
        averages = [own_part(average) for _, average in self._pairs]
        get_ema_multi_avg_fn(keep)(averages, sources, self.updates)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand where the weights do, and the weights where they were afterwards, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for source, average in self._pairs:
            own, other = own_part(source.detach()), own_part(average)
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps under :data:`AVERAGE`."""
        return {UPDATES: self.updates, TENSORS: self.tensors}

    def resume(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's :meth:`state` once :meth:`begin` is called; its tensors may be on ``meta``.

        Raises:
            ValueError: its tensors are not those of this module.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in averaged(module).items()}
        found = {name: tuple(tensor.shape) for name, tensor in state[TENSORS].items()}
        if odd := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
            raise ValueError(
                f"the checkpoint averages other weights than this run trains ({', '.join(odd[:3])}"
                f"{' …' if len(odd) > 3 else ''}); resume with the model settings it was made with, or "
                "leave its average behind with optim.ema_decay=null."
            )
        self.updates, self._saved = state[UPDATES], state[TENSORS]


def averaged(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's state that training changes little by little, by name."""
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and (tensor.requires_grad or not isinstance(tensor, nn.Parameter))
    }


def copy_whole(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """What fills the averages of a module that is not sharded."""
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{AVERAGE}.{name}": tensor for name, tensor in tensors.items()}
