"""Names that are imported when they are first used, so that a model needs no package that only another part needs.

A machine with PyTorch and Triton alone can build and train the models; checkpoints, tokenizers and pictures need
further packages, and say which when they are asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that are defined elsewhere.

    Args:
        package: the ``__name__`` of the module.
        modules: exported name to the relative module that defines it, e.g. ``{"Config": ".configuration"}``.

    Raises:
        ImportError: when a name is used whose module needs a package that is not installed; the message names it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with explained(name):
            value = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


@contextmanager
def explained(name: str):
    """Within the block, a package that is not installed becomes one sentence: what needs it, and what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "interloom", __name__.partition(".")[0]):
            raise
        distribution = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(missing, missing)
        raise ImportError(
            f"{name} needs the package {missing}, which is not installed; install it with "
            f"'pip install {distribution}'.",
            name=missing,
        ) from error
