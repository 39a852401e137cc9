"""A ``task`` of a configuration: the evaluation function it names and that function's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

# A configuration is text that a user may have got from elsewhere: it may call our evaluations, nothing else.
ALLOWED = "interloom.train.evaluation."


def check_task(task: Any) -> Callable[..., dict[str, float]]:
    """The evaluation function that ``task`` names, with its options bound.

    Raises:
        ValueError: the task names no function of ours.
    """
    if not task or not isinstance(task, Mapping):
        raise ValueError("no task is chosen; give one, for instance task=segmentation.")
    target = str(task.get("_target_"))
    if not target.startswith(ALLOWED):
        raise ValueError(
            f"task._target_={target} is not one of {ALLOWED}*; choose one of the tasks in conf/task."
        )
    module, _, name = target.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task._target_={target} cannot be imported ({error}).") from error
    options = {key: value for key, value in task.items() if key not in {"_target_", "_partial_"}}
    return partial(function, **options)


def run_task(
    task: Any, *, checkpoint: Path | str, data: Path | str | None, output_dir: Path
) -> dict[str, float]:
    """Run an evaluation: scores by flat name. ``data`` None leaves the task's own setting in place."""
    function = check_task(task)
    given = {} if data is None else {"data": str(data)}
    return function(checkpoint=str(checkpoint), output_dir=output_dir, **given)
