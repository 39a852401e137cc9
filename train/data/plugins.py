"""What other installed packages add: entry points ``interloom.families``, ``interloom.tasks``, ``interloom.sources``.

Installing a package is consent to run it; nothing here follows from a file or a checkpoint.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

FAMILIES, TASKS, SOURCES = "interloom.families", "interloom.tasks", "interloom.sources"


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name."""
    return {point.name: point for point in entry_points(group=group)}


def load_plugin(group: str, name: str) -> Any:
    """What an entry point names, or None where no installed package has one of that name.

    Raises:
        ValueError: it cannot be imported.
    """
    point = installed(group).get(name)
    if point is None:
        return None
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the entry point {name} = {point.value} of {group} cannot be imported ({error}); mend its "
            "package, or remove it."
        ) from error
