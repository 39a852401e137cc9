"""``plan_only=true``: what a run would need, as a table."""

from __future__ import annotations

from typing import Any

from ..config import TrainConfig
from ..objectives.groupvit.cost import plan_groupvit
from ..objectives.idefics.cost import plan_idefics
from ..planning.communication import A100, EFFICIENCY, LINK_EFFICIENCY
from ..planning.memory import GIB


def print_plan(config: TrainConfig) -> None:
    """Print the table of ``plan_only=true``."""
    from rich.table import Table

    from ..messages import console as new_console

    family = getattr(config.model, "family", None)
    size, plans = plan_idefics(config) if family == "idefics" else plan_groupvit(config)
    console = new_console()
    console.print(
        f"{size.parameters / 1e9:.2f} B parameters, {size.trained / 1e9:.2f} B trained; global batch "
        f"{config.data.batch_size}, micro-batch {config.trainer.micro_batch_size or 'the whole share'}, "
        f"strategy {config.trainer.strategy}, precision {config.trainer.precision}"
    )
    table = Table(
        "GPUs", "weights", "gradients", "optimiser", "gathered", "activations", "GiB each", title=None
    )
    for plan, _ in plans:
        columns: list[Any] = [
            plan.weights,
            plan.gradients,
            plan.optimizer,
            plan.gathered,
            plan.activations,
            plan.total,
        ]
        table.add_row(str(plan.gpus), *(f"{value / GIB:.2f}" for value in columns))
    console.print(table)
    console.print("Add about 1 to 2 GiB for CUDA and the allocator.")
    table = Table("GPUs", "batch each", "passes", "sends GB", "in s", "computes s", "share", "images/s")
    for _, plan in plans:
        share = config.data.batch_size // plan.gpus
        passes = -(-share // min(share, config.trainer.micro_batch_size or share))
        table.add_row(
            str(plan.gpus),
            str(share),
            str(passes),
            f"{plan.sent / 1e9:.2f}",
            f"{plan.seconds:.3g}",
            f"{plan.compute_seconds:.3g}",
            f"{plan.share:.0%}",
            f"{plan.images_per_second:,.0f}",
        )
    console.print(table)
    console.print(
        f"A step on {A100.name}, at {EFFICIENCY:.0%} of the peak and {LINK_EFFICIENCY:.0%} of the links, nothing "
        "hidden behind arithmetic. images/s is what the readers of all machines must deliver."
    )
