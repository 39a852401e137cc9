"""Evaluation by several processes: each scores its share of the batches, and every sample is counted once.

Which samples form a batch does not depend on the number of processes; a process takes every so many-th batch. So no
sample is repeated to make shares equal, scores do not depend on the number of processes, and processes meet only to
bring their results together, on the CPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import messages
from ..data.report import SkipReport

Value = TypeVar("Value")
_MARK = "runs_on_ranks"
_joined = False


def runs_on_ranks(task: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
    """Mark an evaluation that shares its samples out to ranks."""
    setattr(task, _MARK, True)
    return task


@contextmanager
def ranks_of(task: Callable[..., Any]) -> Iterator[None]:
    """Meet the other processes that the launcher started, if any, while ``task`` runs.

    Raises:
        ValueError: there are several processes but the task runs in one.
        SystemExit: a user error that another rank reports.
    """
    global _joined
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield
        return
    check_count(task, count)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo")
    dist.barrier()  # a rank that fails at once would else be gone while another still connects to it
    _joined = True
    try:
        yield
    except (ValueError, FileNotFoundError):
        if _said_by_another():
            raise SystemExit(2) from None
        raise
    finally:
        _joined = False
        dist.destroy_process_group()


def check_count(task: Callable[..., Any], count: int) -> None:
    """
    Raises:
        ValueError: there are several processes but the task runs in one.
    """
    if count > 1 and not getattr(getattr(task, "func", task), _MARK, False):
        raise ValueError(f"this task runs in one process, not in {count}; leave devices out.")


def _said_by_another() -> bool:
    """Whether another rank failed before this one: what is wrong with the data is wrong on all, and said once."""
    before = dist.distributed_c10d._get_default_store().add("interloom/failed", 1) - 1
    if before:
        time.sleep(1.0)  # the launcher ends all ranks with the first: let that one finish its sentence
    return before > 0


def rank_and_count() -> tuple[int, int]:
    """This process's rank among those that evaluate, and their number."""
    return (dist.get_rank(), dist.get_world_size()) if _joined else (0, 1)


def share(count: int, batch_size: int) -> list[range]:
    """This rank's batches of samples ``0 … count - 1``.

    Raises:
        ValueError: the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    rank, ranks = rank_and_count()
    starts = range(0, count, batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts[rank::ranks]]


def gathered_in_order(found: Mapping[int, Value], count: int) -> list[Value]:
    """What all ranks found for samples ``0 … count - 1``, in order, on every rank.

    Raises:
        RuntimeError: a sample was scored twice or not at all, which is a fault of the program.
    """
    parts: list[Any] = [found]
    if _joined:
        parts = [None] * rank_and_count()[1]
        dist.all_gather_object(parts, dict(found))
    whole = {number: value for part in parts for number, value in part.items()}
    if sorted(whole) != list(range(count)) or sum(map(len, parts)) != count:
        raise RuntimeError(f"{sum(map(len, parts))} results for {count} samples.")
    return [whole[number] for number in range(count)]


def summed(values: Tensor) -> Tensor:
    """Sum of a float64 tensor over ranks."""
    total = values.detach().cpu().double()
    if _joined:
        total = total.clone()
        dist.all_reduce(total)
    return total


def merged(report: SkipReport) -> SkipReport:
    """What all ranks left out."""
    if not _joined:
        return report
    parts: list[Any] = [None] * rank_and_count()[1]
    dist.all_gather_object(parts, report.to_dict())
    whole = SkipReport()
    for part in parts:
        whole.merge(part)
    return whole


def tell(line: str) -> None:
    """Print one line on stderr, on the first rank."""
    if rank_and_count()[0] == 0:
        messages.tell(line)
