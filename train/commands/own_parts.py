"""``callbacks.extra``, ``logger.extra``, ``data.augment.extra``, ``objective``: nodes with a ``_target_``, made here.

Hydra's ``instantiate`` calls what a node names. So it is only given what the user typed: the command line, own files
below ``--config-dir``, or the Python that composed the configuration; never what came with a checkpoint or a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from ..config import TrainConfig
from ..objectives.own_parts import OwnParts

TARGET = "_target_"


def make_own_parts(config: TrainConfig) -> OwnParts:
    """The live objects of a typed configuration.

    Raises:
        ValueError: a node has no ``_target_``, cannot be imported or called, or gives something else than it should.
    """
    data = getattr(getattr(config.data, "augment", None), "extra", None) or {}
    return OwnParts(
        callbacks=_made("callbacks.extra", config.callbacks.extra, Callback),
        loggers=_made("logger.extra", config.logger.extra, Logger),
        augment=_made("data.augment.extra", data, Callable),
        objective=None if config.objective is None else _make("objective", config.objective, partial=True),
    )


def _made(group: str, nodes: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(nodes, dict):
        raise ValueError(
            f"{group} is no mapping; give a name and its node, {group}={{mine: {{{TARGET}: pkg.Class}}}}."
        )
    found = {name: _make(f"{group}.{name}", node) for name, node in nodes.items() if node is not None}
    for name, value in found.items():
        fits = callable(value) if kind is Callable else isinstance(value, kind)
        if not fits:
            wanted = (
                "something to call"
                if kind is Callable
                else f"a {kind.__module__.split('.')[0]} {kind.__name__}"
            )
            raise ValueError(f"{group}.{name} made a {type(value).__name__}, expected {wanted}.")
    return found


def _make(place: str, node: Any, *, partial: bool = False) -> Any:
    if not isinstance(node, dict) or not isinstance(node.get(TARGET), str):
        raise ValueError(f"{place}={node!r} has no {TARGET}; give {place}.{TARGET}=package.module.Name.")
    if os.getcwd() not in sys.path:  # a module of the user's own lies where the command is typed, mostly
        sys.path.append(os.getcwd())
    try:
        return instantiate({**node, "_partial_": True} if partial else node, _convert_="all")
    except (InstantiationException, HydraException) as error:
        cause = error.__cause__ or error
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{place}.{TARGET}={node[TARGET]} cannot be made ({said[:300]}).") from error
