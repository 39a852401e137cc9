"""A ``task`` of a configuration: the evaluation function it names and that function's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ..data.plugins import TASKS, installed
from ..data.shards.made_by import how_to_make

# A configuration is text that a user may have got from elsewhere: it may call our evaluations, nothing else.
ALLOWED = "interloom.train.evaluation."
# Tasks that score what `interloom data demo` draws, and nothing else, by the modules they are in.
DRAWN = {"drawn_scenes": "demo", "grounding": "grounding"}


def check_task(task: Any) -> Callable[..., dict[str, float]]:
    """The evaluation function that ``task`` names, with its options bound.

    Raises:
        ValueError: the task names no function of ours.
    """
    if not task or not isinstance(task, Mapping):
        raise ValueError("no task is chosen; give one, for instance task=segmentation.")
    target = str(task.get("_target_"))
    added = {point.value.replace(":", ".") for point in installed(TASKS).values()}
    if not target.startswith(ALLOWED) and target not in added:
        raise ValueError(
            f"task._target_={target} is not one of {ALLOWED}*; choose one of the tasks in conf/task, or "
            f"install a package that adds it as an entry point of {TASKS}."
        )
    module, _, name = target.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task._target_={target} cannot be imported ({error}).") from error
    options = {key: value for key, value in task.items() if key not in {"_target_", "_partial_"}}
    return partial(function, **options)


def check_task_fits(task: Any, sources: Sequence[str]) -> None:
    """Look before a run begins whether it can be scored at its end.

    Args:
        task: the group ``task`` of the run; None scores nothing.
        sources: what the run trains on.

    Raises:
        ValueError, FileNotFoundError: the task has no data, or scores drawn scenes elsewhere than it trains on.
    """
    if not task:
        return
    function = check_task(task).func  # type: ignore[attr-defined]
    module = function.__module__.rpartition(".")[2]
    name = DRAWN.get(module, module)
    data = task.get("data")
    if data is None:
        raise ValueError(
            f"task={name} has no data to score the run on at its end; give +task.data=DIR, or task=none."
        )
    folder = Path(str(data))
    if "://" not in str(data) and not folder.exists():
        advice = how_to_make(folder) or "give +task.data=DIR of what to score on, or task=none"
        raise FileNotFoundError(
            f"task.data={data}, on which the run is scored at its end, does not exist; {advice}."
        )
    if module not in DRAWN:
        return
    foreign = [s for s in sources if not Path(s).resolve().is_relative_to(folder.resolve())]
    if foreign:
        raise ValueError(
            f"task={name} scores the drawn scenes of {data}, but the run trains on {foreign[0]}; give task=none, or a "
            "task for data of your own, such as task=retrieval +task.data=DIR (task.data=DIR if those are drawn too)."
        )


def run_task(
    task: Any, *, checkpoint: Path | str, data: Path | str | None, output_dir: Path
) -> dict[str, float]:
    """Run an evaluation: scores by flat name. ``data`` None leaves the task's own setting in place."""
    function = check_task(task)
    given = {} if data is None else {"data": str(data)}
    return function(checkpoint=str(checkpoint), output_dir=output_dir, **given)
