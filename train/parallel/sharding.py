"""Sharded models (FSDP2): which parts of a model gather their weights together, one function a model.

``fully_shard`` is applied from outside. A block (a transformer layer, say) is one unit: its weights are all-gathered
when it runs, freed after it, gathered again for its backward pass, and its gradients are reduce-scattered as a mean
over ranks, the convention of :class:`~.module.TrainingModule`. The module itself is sharded last and holds no weights
as a unit; it ties the units together.

Only matrices are cut up. Vectors and scalars (norms, biases, gates, temperatures) stay whole on every rank, a
thousandth of a model, and their gradients are averaged as under DDP.

In mixed precision a block's matrices, which autocast would convert anyway, are gathered in bfloat16 and gradients
reduced in float32; all else keeps the type it is stored in. So a step computes what it computes under DDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from ..config import TrainerConfig

# Gathered and reduced as stored.
EXACT = MixedPrecisionPolicy(cast_forward_inputs=False)


class Sharder:
    """Applies ``fully_shard`` to units of a model on one mesh.

    Args:
        mesh: one dimension, all ranks.
        precision: ``trainer.precision``.
    """

    def __init__(self, mesh: DeviceMesh, precision: str) -> None:
        # Nothing in our models changes the result of a unit in place, which is what it warns of.
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
        self.mesh = mesh
        self.blocks = EXACT
        if precision == "bf16-mixed":
            self.blocks = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    @classmethod
    def over_all_ranks(cls, config: TrainerConfig) -> Sharder:
        """For the run's process group, which must have begun."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return cls(init_device_mesh(device, (dist.get_world_size(),)), config.precision)

    def block(self, module: nn.Module, *, whole: Iterable[nn.Parameter] = ()) -> None:
        """Shard a block's matrices, gathered in the compute dtype; parameters in ``whole`` stay on every rank."""
        self._shard(module, self.blocks, whole)

    def tower(self, tower: Any) -> None:
        """Shard an image tower that trains: its ``blocks()`` are units, and so is each of its ``tables()``."""
        for block in tower.blocks():
            self.block(block)
        for table in tower.tables():
            self.exact(table)

    def exact(self, *modules: nn.Module) -> None:
        """Shard modules as one unit in the dtype they are stored in."""
        self._shard(modules[0] if len(modules) == 1 else list(modules), EXACT)

    def root(self, module: nn.Module, methods: Iterable[str]) -> None:
        """Shard the module last, without weights of its own; ``methods`` run its parts as ``forward`` would."""
        rest = [parameter for parameter in module.parameters() if not isinstance(parameter, DTensor)]
        self._shard(module, EXACT, rest)
        for method in methods:
            register_fsdp_forward_method(module, method)

    def _shard(
        self,
        module: nn.Module | list[nn.Module],
        policy: MixedPrecisionPolicy,
        whole: Iterable[nn.Parameter] = (),
    ) -> None:
        parts = module if isinstance(module, list) else [module]
        vectors = [p for part in parts for p in part.parameters() if p.ndim <= 1]
        fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=policy,
            reshard_after_forward=True,
            ignored_params={*whole, *vectors},
        )


def reduce_unused(module: nn.Module) -> None:
    """Count a weight that a rank's batch did not use as one with a gradient of zero, so that ranks agree."""
    assert isinstance(module, FSDPModule)
    if not hasattr(module, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"sharding this model needs torch 2.13 or newer and this is {torch.__version__}: older ones wait for "
            "ever where a rank's batch leaves a weight unused; upgrade torch, or train with trainer.strategy=ddp."
        )
    module.set_reduce_scatter_unused_params(True)


def reduce_now(module: nn.Module, now: bool) -> None:
    """Whether the next backward passes reduce-scatter their gradients or keep them whole on this rank."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def sharded(tensors: Iterable[Any]) -> bool:
    """Whether any of them is a shard."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)
