"""Parameter groups and learning-rate schedules, shared by both models.

A schedule here is a pure function of the optimiser step, so resuming needs no scheduler state, and its length
is ``max_steps`` of the config. (Lightning's ``estimated_stepping_batches`` is not used: reading it loads the
data once more and loses the data position of a resumed run.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..config import OptimConfig


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into one group with weight decay and one without.

    No decay on vectors and scalars (norms, biases, temperatures). A parameter shared by several modules counts once.
    """
    seen: set[int] = set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            (plain if parameter.ndim <= 1 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": plain, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def without_mixing(groups: list[dict[str, object]]) -> list[dict[str, object]]:
    """The groups with shards and whole parameters apart: one fused operation takes either, not both."""
    parts: list[dict[str, object]] = []
    for group in groups:
        parameters: list[nn.Parameter] = group["params"]  # type: ignore[assignment]
        for shards in (True, False):
            chosen = [p for p in parameters if isinstance(p, DTensor) == shards]
            if chosen:
                parts.append({**group, "params": chosen})
    return parts


def adamw(groups: list[dict[str, object]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over ``groups``; the rate is set before every step."""
    first, second = config.betas
    groups = without_mixing(groups)
    # PyTorch itself takes the slow loop over parameters for shards.
    shards = any(isinstance(p, DTensor) and p.is_cuda for group in groups for p in group["params"])  # type: ignore[union-attr]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(first, second), eps=config.eps, foreach=True if shards else None
    )


def batch_scale(config: OptimConfig, global_batch: int) -> float:
    """The factor of linear scaling (Goyal et al., 2017): global batch over the batch the rate was found at."""
    return 1.0 if config.lr_batch_size is None else global_batch / config.lr_batch_size


def learning_rate(config: OptimConfig, step: int, max_steps: int, global_batch: int) -> float:
    """The rate of optimiser step ``step`` (0 for the first of ``max_steps``).

    Linear from ``warmup_lr`` to the peak over ``warmup_steps``, then by ``schedule`` to ``final_lr``.
    """
    scale = batch_scale(config, global_batch)
    peak, start, end = config.lr * scale, config.warmup_lr * scale, config.final_lr * scale
    if step < config.warmup_steps:
        return start + (peak - start) * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    done = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    if config.schedule == "linear":
        return peak + (end - peak) * done
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
