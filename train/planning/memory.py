"""What a run would need of each GPU, before anybody rents one: ``interloom train … plan_only=true``.

The model is built on the ``meta`` device, so its parameters are counted exactly without memory for them. Per GPU:

- **weights**: 4 bytes a parameter (mixed precision keeps float32 masters; frozen matrices may take 2, or be
  quantised: then as many as are stored), over all ranks under FSDP2;
- **gradients** 4 and **optimiser** 8 bytes a *trained* parameter (12 with ``optim.ema_decay``: the average of the
  weights), over all ranks under FSDP2;
- **gathered**: under FSDP2 the two largest blocks whole at a time, in the compute dtype or as quantised;
- **activations** of one micro-batch: what backward keeps. With activation checkpointing that is one residual
  stream a block and the inside of a single block; without, the inside of all.

The inside of a block is counted tensor by tensor from the layers' shapes (:func:`_decoder_block` and so on); a
test compares the sum with the tensors that autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..config import TrainConfig
from .communication import CommunicationPlan, StepWork, plan_communication

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU of a run over ``gpus`` of them."""

    gpus: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, without the allocator's and CUDA's own overhead."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model: in all, trained, of its largest block, and the bytes its weights take.

    Attributes:
        whole_bytes: of the weights, those that every rank holds whole under FSDP2 (scales of quantised matrices;
            other vectors are a thousandth, and not counted apart).
        packed_block: bytes of the largest block that are gathered as they are stored.
    """

    parameters: int
    trained: int
    largest_block: int
    weight_bytes: int
    whole_bytes: int = 0
    packed_block: int = 0


def measure(model: nn.Module) -> ModelSize:
    """Count a model, best one on ``meta``."""
    parameters = list(model.parameters())
    blocks = [
        sum(p.numel() for p in module.parameters())
        for container in model.modules()
        if isinstance(container, nn.ModuleList)
        for module in container
    ]
    return ModelSize(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        max(blocks, default=0),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def plan_memory(
    size: ModelSize,
    activations: float,
    *,
    gpus: int,
    sharded: bool,
    compute_bytes: int = 2,
    averaged: bool = False,
) -> MemoryPlan:
    """Memory of one GPU.

    Args:
        size: of the model.
        activations: bytes that backward keeps of one micro-batch.
        gpus: in the run.
        sharded: FSDP2; otherwise every GPU holds the whole model.
        compute_bytes: of one number in the compute dtype.
        averaged: a moving average of the trained weights is kept.
    """
    over = gpus if sharded else 1
    gathered = 0
    if sharded and gpus > 1:
        gathered = 2 * (size.largest_block * compute_bytes + size.packed_block)
    return MemoryPlan(
        gpus,
        (size.weight_bytes - size.whole_bytes) / over + size.whole_bytes,
        4 * size.trained / over,
        (12 if averaged else 8) * size.trained / over,
        gathered,
        activations,
    )


def _vision_block(width: int, inner: int, patches: int, size: int) -> float:
    return 2 * 4 * patches * width + 7 * patches * width * size + 3 * patches * inner * size


Plans = tuple[ModelSize, list[tuple[MemoryPlan, CommunicationPlan]]]


def _both(
    config: TrainConfig, size: ModelSize, activations: float, work: StepWork, gpus: int
) -> tuple[MemoryPlan, CommunicationPlan]:
    sharded = config.trainer.strategy == "fsdp2"
    compute = 4 if config.trainer.precision == "32-true" else 2
    memory = plan_memory(
        size,
        activations,
        gpus=gpus,
        sharded=sharded,
        compute_bytes=compute,
        averaged=config.optim.ema_decay is not None,
    )
    return memory, plan_communication(work, gpus=gpus, sharded=sharded, compute_bytes=compute)
