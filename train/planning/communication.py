"""What a step of a run would send and compute on each GPU: the other half of ``plan_only=true``.

Counted, per GPU and optimiser step (n GPUs, a ring sends (n - 1) / n of a tensor in an all-gather or reduce-scatter
and twice that in an all-reduce; Rabenseifner's bound, which NCCL's rings and trees meet):

- **ddp**: one all-reduce of float32 gradients, whatever the micro-batches;
- **fsdp2**: in every pass, weights gathered for forward and again for backward in the compute dtype, and gradients
  reduce-scattered in float32;
- **contrastive objective**: features of the global batch gathered forward, their gradients summed backward.

Up to 8 GPUs talk over NVLink; beyond, a ring enters and leaves each machine, whose network cards share its bytes.
Times are bytes over bandwidth and FLOPs over the tensor cores' peak at :data:`EFFICIENCY`, so they are estimates: a
run of one GPU and one of two machines should replace them before a cluster is booked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


GPUS_PER_MACHINE = 8
# Of the peaks: what large matrix products and large NCCL messages usually reach.
EFFICIENCY, LINK_EFFICIENCY = 0.4, 0.8


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: bytes a second in one direction, of one GPU's NVLink and of all its network cards."""

    name: str
    flops: float
    nvlink: float
    network: float


A100 = Hardware("A100 80GB, NVLink 3, 8 × HDR InfiniBand", 312e12, 300e9, 200e9)
H100 = Hardware("H100 80GB, NVLink 4, 8 × NDR InfiniBand", 989e12, 450e9, 400e9)


@dataclass(frozen=True)
class StepWork:
    """What a recipe does in one optimiser step, over all GPUs or of one model.

    Attributes:
        flops: of the whole step on the global batch, recomputation included.
        trained, gathered: parameters that train, and that FSDP2 gathers.
        passes: forward passes of the encoders with gradients, per optimiser step (micro-batches).
        extra_forwards: forward passes without, which gather too (contrastive accumulation).
        features: numbers of the contrastive features of the global batch.
        images: of the global batch.
    """

    flops: float
    trained: int
    gathered: int
    passes: int
    extra_forwards: int
    features: int
    images: int


@dataclass(frozen=True)
class CommunicationPlan:
    """Bytes that one GPU sends in a step, and the seconds that they and the arithmetic take."""

    gpus: int
    sent: float
    seconds: float
    compute_seconds: float
    images_per_second: float

    @property
    def share(self) -> float:
        """Of a step, if nothing of it is hidden behind arithmetic."""
        return self.seconds / (self.seconds + self.compute_seconds)


def plan_communication(
    work: StepWork, *, gpus: int, sharded: bool, compute_bytes: int, hardware: Hardware = A100
) -> CommunicationPlan:
    """Communication of one GPU of ``gpus``."""
    around = (gpus - 1) / gpus
    if sharded:
        gathers = 2 * work.passes + work.extra_forwards
        sent = around * (gathers * work.gathered * compute_bytes + work.passes * work.trained * 4)
    else:
        sent = 2 * around * work.trained * 4
    sent += 2 * around * work.features * 4
    several = gpus > GPUS_PER_MACHINE
    # A ring crosses into each machine once: all its cards carry what one GPU's links carry inside.
    bandwidth = min(hardware.nvlink, hardware.network) if several else hardware.nvlink
    compute = work.flops / gpus / (hardware.flops * EFFICIENCY)
    seconds = sent / (bandwidth * LINK_EFFICIENCY)
    return CommunicationPlan(gpus, sent, seconds, compute, work.images / (compute + seconds))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_flops(parameters: int, places: float, context: float, width: int) -> float:
    """Forward pass of a layer: two for every weight and place, and both products of attention."""
    return places * (2 * parameters + 4 * context * width)
