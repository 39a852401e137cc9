"""Gradients over ranks, without a wrapper around the model.

``DistributedDataParallel`` starts an all-reduce as soon as a parameter's gradient is ready, once a forward pass. A
step with contrastive accumulation has one backward pass for the projectors and several for the encoders, so
here the gradients are averaged once, after all of them, in buckets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..messages import OutsideFault, tell
from .launch import adopt_launcher

if TYPE_CHECKING:
    from ..config import TrainerConfig


Value = TypeVar("Value")


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def say(message: str) -> None:
    """One line to the user, from rank 0."""
    if ranks()[0] == 0:
        tell(message)


def start_ranks(config: TrainerConfig, accelerator: str) -> None:
    """Join the process group of the launcher, if there is one.

    Raises:
        ValueError: the launcher started another number of processes than ``trainer`` speaks of.
    """
    wanted = config.devices * config.num_nodes
    launched = adopt_launcher()
    if launched != wanted:
        raise ValueError(
            f"trainer.devices={config.devices} on trainer.num_nodes={config.num_nodes} means {wanted} processes, "
            f"but {launched} {'was' if launched == 1 else 'were'} started; make both the same, with trainer=ddp or "
            "trainer=fsdp2."
        )
    if launched == 1 or dist.is_initialized():
        return
    if accelerator == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # The watchdog speaks first; this ends a wait that it cannot see.
    timeout = timedelta(seconds=1.5 * config.stuck_timeout + 60)
    dist.init_process_group("nccl" if accelerator == "cuda" else "gloo", timeout=timeout)


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """What ``make`` returns on rank 0, on every rank; what it raises there is raised on every rank too."""
    if ranks()[1] == 1:
        return make()
    box: list[Any] = [None, None]
    if ranks()[0] == 0:
        try:
            box[0] = make()
        except (ValueError, FileNotFoundError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agree(condition: Tensor, request: int) -> tuple[bool, int]:
    """Whether a bool [] holds on every rank, and the largest request of any; the same answers on all of them."""
    if ranks()[1] == 1:
        return bool(condition), request
    # One collective for both: each is a wait for the slowest rank.
    worst = torch.stack([~condition, torch.tensor(request, device=condition.device)])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    failed, request = worst.tolist()
    return not failed, request


class MeanUnderWay:
    """The mean over ranks of a value that each has its own of, without its gradient; :meth:`wait` gives it.

    Ranks go on computing in the meantime; each must start its collectives in the same order.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._count, self._work = value.detach(), ranks()[1], None
        if self._count > 1:
            self._value = self._value.clone()
            self._work = dist.all_reduce(self._value, async_op=True)

    def wait(self) -> Tensor:
        if self._work is None:
            return self._value
        self._work.wait()
        return self._value / self._count


def gathered(value: Value) -> list[Value]:
    """Every rank's ``value`` on rank 0, in order; nothing on the others."""
    rank, world_size = ranks()
    if world_size == 1:
        return [value]
    everyone: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(value, everyone, dst=0)
    return everyone or []


def of_all_ranks(value: Value) -> list[Value]:
    """Every rank's ``value``, in order, on every rank."""
    count = ranks()[1]
    if count == 1:
        return [value]
    everyone: list[Any] = [None] * count
    dist.all_gather_object(everyone, value)
    return everyone


def rank_lost(error: BaseException) -> OutsideFault | None:
    """What a collective raises where another rank is gone, as one sentence without the library's stack; else None."""
    said = str(error)
    network = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
    gloo = isinstance(error, RuntimeError) and ("/gloo/" in said or "closed by peer" in said)
    if not (network or gloo):
        return None
    return OutsideFault(
        f"rank {ranks()[0]} lost another rank in the middle of a step (killed, out of memory, or its machine is away; "
        "that one's log says more); ckpt_path=last continues from the last checkpoint."
    )


def together(work: Callable[[], Value]) -> Value:
    """Run ``work`` on every rank; return its result where it went well everywhere.

    Raises:
        OSError: it failed on some rank, with the reason of the first; raised on every rank, so that none waits for
            another. Alone, a rank sees the error itself.
    """
    rank, world_size = ranks()
    if world_size == 1:
        return work()
    result: Value | None = None
    problem: str | None = None
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
        problem = f"rank {rank}: {' '.join(str(error).split()) or type(error).__name__}"
    problems: list[str | None] = [None] * world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise OSError(found) from cause
    return result  # type: ignore[return-value]


def in_turns(work: Callable[[], Value], turns: int) -> Value:
    """Run ``work`` on the ``turns`` ranks of each machine one after another, so that its memory is needed once.

    What it raises on one rank is raised on every one. ``work`` must not communicate.
    """
    result: Value | None = None
    for turn in range(turns):
        error: Exception | None = None
        if int(os.environ.get("LOCAL_RANK", "0")) == turn:
            try:
                result = work()
            except (ValueError, FileNotFoundError) as problem:
                error = problem
        errors: list[Exception | None] = [None] * ranks()[1]
        dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found
    return result  # type: ignore[return-value]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, in their order; a row's gradient is the sum of what every rank sends back.

    With each rank's loss the mean over its own images, that sum is the number of ranks times the derivative of
    the mean over all images: the convention of the other losses. Every rank has as many rows.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    return _GatherRows.apply(rows) if rows.requires_grad else RowsUnderWay(rows).wait()


class RowsUnderWay:
    """Rows of all ranks, in their order, without their gradients, once :meth:`wait` returns them."""

    def __init__(self, rows: Tensor) -> None:
        self._parts, self._work = [rows], None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            self._work = dist.all_gather(self._parts, rows.contiguous(), async_op=True)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return torch.cat(self._parts)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        return RowsUnderWay(rows).wait()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def device() -> str:
    """The fastest device there is for this process."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
