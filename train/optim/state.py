"""Optimiser state by parameter name, so that it survives another order, grouping or sharding of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def parameter_names(module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Each parameter's name in ``module``."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for parameter in parameters]


def managed_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser in the order it numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def named_state(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A state as ``Optimizer.state_dict`` gives it, by name instead of number."""
    # Before the first step that changes a weight there are no entries, and a sharded state has no groups.
    listed = (key for group in state["param_groups"] for key in group["params"])
    if any(isinstance(key, str) for key in (*state["state"], *listed)):
        return state
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}


def numbered_state(
    state: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The same for ``Optimizer.load_state_dict`` of ``optimizer``, whose own settings and groups stay.

    A parameter that the state does not know begins without one, as in its first step.
    """
    names = parameter_names(module, managed_parameters(optimizer))
    numbers = {name: number for number, name in enumerate(names)}
    entries = {numbers[name]: entry for name, entry in state["state"].items() if name in numbers}
    return {"state": entries, "param_groups": optimizer.state_dict()["param_groups"]}
