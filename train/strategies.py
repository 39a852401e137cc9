"""``trainer=fsdp2``: Lightning's model-parallel strategy, sharding over all ranks, with checkpoints of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from .checkpointing.sharded import MOMENTS, WEIGHTS, load_tensors, open_sharded, save_sharded
from .optim.state import managed_parameters, parameter_names
from .parallel.ranks import together
from .parallel.sharding import Sharder

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class ShardedStrategy(ModelParallelStrategy):
    """Every parameter, gradient and moment is cut along its rows over all ranks (FSDP2).

    The module cuts itself up in ``configure_model`` with :meth:`sharder`. A checkpoint is restored afterwards, each
    rank reading its part, from a sharded directory or a ``.ckpt`` alike.

    Args:
        precision: ``trainer.precision``.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision
        self._opened: Path | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        for tensor in [*self._module().parameters(), *self._module().buffers()]:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), src=0)

    def sharder(self) -> Sharder:
        """What cuts a module up over all ranks."""
        return Sharder(self.device_mesh["data_parallel"], self.precision)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards, by name."""
        return self._module().state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards of the moments, numbered as the optimiser does."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        save_sharded(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint; large tensors are read when model and optimiser are restored."""
        path = Path(checkpoint_path)
        self._opened = path
        if path.is_dir():
            return open_sharded(path)
        # Mapped, not read: a rank touches the pages of its shards alone.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        saved: dict[str, Tensor] = checkpoint["state_dict"]
        # What is frozen and quantised is in no checkpoint, and stays as it was built.
        own = {WEIGHTS + name: t for name, t in self._module().state_dict().items() if name in saved}
        self.fill(own, {WEIGHTS + name: tensor for name, tensor in saved.items()})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (optimizer,) = self.optimizers
        (state,) = checkpoint["optimizer_states"]
        parameters = managed_parameters(optimizer)
        names = parameter_names(self._module(), parameters)
        own: dict[str, Tensor] = {}
        saved: dict[str, Tensor] = {}
        entries: dict[int, dict[str, Tensor]] = {}
        for number, entry in state["state"].items():
            entries[number] = {}
            for key, value in entry.items():
                if key == "step":
                    entries[number][key] = value
                    continue
                name = f"{MOMENTS}{names[number]}.{key}"
                saved[name] = value
                own[name] = entries[number][key] = torch.zeros_like(parameters[number].detach())
        self.fill(own, saved)
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})

    @torch.no_grad()
    def fill(self, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
        """Copy saved tensors into own shards; those on ``meta`` are read from the opened checkpoint's directory.

        Both by the names that a sharded checkpoint has for them. Every rank must call it.
        """
        absent = {name: tensor for name, tensor in own.items() if saved[name].is_meta}
        if absent:
            assert self._opened is not None
            load_tensors(absent, self._opened, alone=False)
        for name, tensor in own.items():
            if name in absent:
                continue
            if isinstance(tensor, DTensor):
                tensor.to_local().copy_(_own_rows(saved[name], tensor))
            else:
                tensor.copy_(saved[name])

    def _module(self) -> LightningModule:
        module = self.lightning_module
        assert module is not None
        return module


def _own_rows(whole: Tensor, like: DTensor) -> Tensor:
    """The part of ``whole`` that this rank holds of ``like``."""
    (placement,) = like.placements
    if isinstance(placement, Replicate):
        return whole
    assert isinstance(placement, Shard)
    parts = list(torch.chunk(whole, like.device_mesh.size(), dim=placement.dim))
    rank = like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole.narrow(placement.dim, 0, 0)


class AveragingStrategy(DDPStrategy):
    """Lightning's process setup of DDP; the module averages its own gradients (:func:`average_gradients`)."""

    def configure_ddp(self) -> None:
        model: LightningModule | None = self.lightning_module
        assert model is not None
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        def write() -> None:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)

        together(write)
