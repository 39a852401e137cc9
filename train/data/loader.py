"""From a plan to batches: the same ones in the same order, whatever ranks and workers do.

One batch is a rank's whole share of one optimiser step. Global step s takes the global positions
``[s * G, (s + 1) * G)`` of the plan, G being the global batch; rank r of W takes the contiguous part
``[s * G + r * G / W, s * G + (r + 1) * G / W)``. So a step is all the state there is::

    loader = PlanLoader(plan, fetch, global_batch_size=4096, rank=r, world_size=W, workers=8, steps=100_000)
    loader.start_step = trainer.global_step      # resume anywhere, also on another W
    for batch in loader: ...

``fetch(positions)`` is any picklable callable from global positions int64 [n] to a batch: a dict of tensors
and lists. It may put a list of ``(reason, name, detail)`` under ``"skipped"``; the loader takes it out, keeps
the count in ``loader.report`` and stops the run when more than ``max_skip_rate`` of the samples are lost.

``len(loader)`` is the number of steps of the whole run, also when it starts in the middle: Lightning counts
batches from the beginning of a restored epoch. A loader without a length would make it read one batch ahead
and lose it on resume.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..files import free_bytes, refusal
from ..messages import OutsideFault
from ..parallel.processes import end_at_exit, end_with_parent
from .order import Plan
from .report import BadSample, SkipRateError, SkipReport
from .shards.remote import retries

Fetch = Callable[[np.ndarray], dict[str, Any]]
# So many bad samples in a row are no accident: a folder has gone, or a disk.
MAX_REPLACEMENTS = 64
_RETRIED = "retried"


class PlanLoader:
    """Batches of a plan for one rank.

    Args:
        plan: gives the length of an epoch and the fingerprint.
        fetch: makes a batch of global positions; runs in the workers.
        global_batch_size: samples of one optimiser step over all ranks; divisible by ``world_size``.
        rank, world_size: which share is this loader's.
        workers: processes that fetch; 0 fetches in this one.
        steps: optimiser steps of the whole run; None for one pass over the plan.
        start_step: first step to yield; may be set until iteration begins.
        exact: for evaluation: positions past the first epoch repeat its beginning and the batch says so in
            ``valid`` bool [n], so that every rank has as many equal batches and each sample counts once.
        prefetch: batches a worker prepares ahead.
        pin_memory: hand over page-locked tensors; None does so where there is a GPU.
        max_skip_rate: share of samples that may be lost before the run stops.
        lost: what opening the shards left out; appears in :meth:`summary`, not in the rate.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        plan: Plan,
        fetch: Fetch,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        steps: int | None = None,
        start_step: int = 0,
        exact: bool = False,
        prefetch: int = 2,
        pin_memory: bool | None = None,
        max_skip_rate: float = 0.01,
        lost: SkipReport | None = None,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global batch of {global_batch_size} on {world_size} ranks given, expected a positive "
                "multiple of the number of ranks"
            )
        if workers < 0:
            raise ValueError(
                f"data.workers={workers} given, expected a number of processes; 0 reads in this one"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} given, expected 0 to {world_size - 1}")
        self.plan, self.fetch = plan, fetch
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.workers, self.prefetch = workers, prefetch
        self.steps = -(-len(plan) // global_batch_size) if steps is None else steps
        self.start_step, self.exact, self.max_skip_rate = start_step, exact, max_skip_rate
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.report, self.lost = SkipReport(), lost
        # How often servers of remote shards had to be asked again.
        self.retried = 0

    def __len__(self) -> int:
        return self.steps

    def positions(self, step: int) -> np.ndarray:
        """Global positions int64 [G / W] of this rank at a step."""
        share = self.global_batch_size // self.world_size
        first = step * self.global_batch_size + self.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def fingerprint(self) -> dict[str, Any]:
        """What the meaning of a step depends on: the plan's fingerprint and the global batch."""
        return {**self.plan.fingerprint(), "global_batch_size": self.global_batch_size}

    def summary(self) -> SkipReport:
        """Everything lost so far, by this rank: skipped samples and shards left out on opening."""
        report = SkipReport.from_dict(self.report.to_dict())
        if self.lost is not None:
            report.merge({**self.lost.to_dict(), "seen": 0})
        return report

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(self.start_step, self.steps),
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            pin_memory=self.pin_memory,
            worker_init_fn=_start_worker,
        )
        min_seen = min(1000, len(self.plan))
        batches = iter(loader)
        end_at_exit(getattr(batches, "_workers", ()))
        for batch in batches:
            if isinstance(batch, _Failure):
                raise batch.kind(batch.message)
            self.retried += batch.pop(_RETRIED, 0)
            for reason, name, detail in batch.pop("skipped", ()):
                self.report.add(reason, name, detail)
            self.report.seen += self.global_batch_size // self.world_size
            self.report.check(self.max_skip_rate, min_seen)
            yield batch


@dataclass(frozen=True)
class _Failure:
    """An error of one sentence on its way out of a worker, without the worker's traceback around it."""

    kind: type[ValueError | OutsideFault]
    message: str


class _Steps(Dataset):
    """Step to batch; what the workers run."""

    def __init__(self, loader: PlanLoader) -> None:
        self.positions, self.fetch = loader.positions, loader.fetch
        self.epoch = len(loader.plan) if loader.exact else None

    def __getitem__(self, step: int) -> dict[str, Any] | _Failure:
        positions = self.positions(step)
        valid = None if self.epoch is None else torch.from_numpy(positions < self.epoch)
        try:
            batch = self.fetch(positions if self.epoch is None else positions % self.epoch)
            batch = batch if valid is None else {**batch, "valid": valid}
            if get_worker_info() is not None:
                _in_shared_memory(batch)
            batch[_RETRIED] = retries.take()
        except OutsideFault as error:
            return _Failure(OutsideFault, str(error))
        except ValueError as error:
            kind = SkipRateError if isinstance(error, SkipRateError) else ValueError
            return _Failure(kind, str(error))
        except (OSError, RuntimeError) as error:
            problem = _no_shared_memory(error) if get_worker_info() is not None else None
            if problem is None:
                raise
            return _Failure(ValueError, problem)
        return batch


def _in_shared_memory(value: Any) -> None:
    """Move a batch to where the parent reads it, here and now.

    Left to the queue's own thread, a batch that finds no room is lost there, and the parent waits for it for ever.
    """
    if isinstance(value, torch.Tensor):
        value.share_memory_()
    elif isinstance(value, dict):
        for part in value.values():
            _in_shared_memory(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _in_shared_memory(part)


def _no_shared_memory(error: Exception) -> str | None:
    """What to say of an error that shared memory is full, or None where it is another."""
    said = str(error)
    if "shared memory" not in said and refusal(error) is None:
        return None
    info, free = get_worker_info(), free_bytes("/dev/shm/batch")
    workers = info.num_workers if info is not None else 0
    return (
        f"data.workers={workers} hand batches over in /dev/shm, which is full ({free or 0:,} bytes are free): make it "
        "larger (docker run --shm-size=8g), or lower data.workers or data.batch_size; data.workers=0 needs none."
    )


def worker_lost(error: BaseException) -> OutsideFault | None:
    """PyTorch's notice of a dead worker, which comes at any line of the parent, as one sentence; None for others."""
    said = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not said.startswith("DataLoader worker (pid"):
        return None
    return OutsideFault(
        f"a data worker died ({said.partition('. ')[0].rstrip('.')}): out of memory, mostly; lower data.workers or "
        "data.batch_size. ckpt_path=last continues from the last checkpoint."
    )


def _start_worker(worker: int) -> None:
    end_with_parent()
    # A signal to the process group is for the trainer, which still needs its batches to reach a safe point.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor to decode into; inside a worker it already lies in shared memory.

    The default way makes a batch in private memory and copies it once more to hand it over.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]


def load_or_replace(
    plan: Plan,
    position: int,
    load: Callable[[Any], Any],
    skipped: list[tuple[str, str, str]],
    located: Any = None,
) -> Any:
    """``load`` of what lies at a position, or of the next position whose sample is good.

    A bad sample thus leaves every other sample where it was, and its replacement depends on the plan alone.

    Args:
        load: from what ``plan.locate`` gives for one position to anything; raises :class:`BadSample`.
        skipped: gets ``(reason, name, detail)`` of the sample at ``position`` if that one is bad.
        located: ``plan.locate`` of the position where the caller has it already.

    Raises:
        SkipRateError: nothing good among the next 64.
    """
    first: BadSample | None = None
    for attempt in range(MAX_REPLACEMENTS):
        try:
            known = located is not None and attempt == 0
            return load(located if known else plan.locate(np.array([position + attempt]))[0])
        except BadSample as bad:
            if first is None:
                first = bad
                skipped.append((bad.reason, bad.name, bad.detail))
    raise SkipRateError(
        f"{MAX_REPLACEMENTS} samples in a row cannot be used, beginning with {first}; "
        "`interloom data verify DIR` lists what is broken"
    )
