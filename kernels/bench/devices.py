"""Peak rates of one representative device per architecture, and the roofline time they allow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Published peaks: memory bandwidth in bytes a second, dense bfloat16 matrix products in FLOP a second."""

    name: str
    bandwidth: float
    flops: float


DEVICES = {
    "sm_80": Device("A100 80 GB SXM", 2.039e12, 312e12),
    "sm_86": Device("RTX A6000", 0.768e12, 155e12),
    "sm_89": Device("L40S", 0.864e12, 362e12),
    "sm_90": Device("H100 SXM", 3.35e12, 989e12),
    "sm_100": Device("B200", 8.0e12, 2250e12),
    "sm_120": Device("RTX PRO 6000", 1.792e12, 504e12),
    "gfx942": Device("MI300X", 5.3e12, 1307e12),
}


def modelled_seconds(target: str, moved: int, flops: int) -> float:
    """The longer of moving ``moved`` bytes and computing ``flops`` at the peaks of the target's device.

    A lower bound by model, not a time: nothing reaches both peaks, and launches are free here; on the other
    hand every byte that a kernel loads counts as coming from memory, though caches serve some.
    """
    device = DEVICES[target]
    return max(moved / device.bandwidth, flops / device.flops)
