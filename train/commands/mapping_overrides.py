"""`data.sources={mine: [data/mine]}` on the command line names the sources, whatever an experiment named.

Hydra would merge the mapping into the experiment's, and refuses names that are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

# Names and ``_target_`` nodes of the user's own parts.
OWN = ("callbacks.extra", "logger.extra", "data.augment.extra", "objective")
# Settings whose keys are the user's own names.
MAPPINGS = ("data.sources", "data.val", "data.weights", *OWN[:-1])


def allow_new_names(arguments: Iterable[str]) -> list[str]:
    """The arguments for Hydra: mappings of the user's names may bring new ones."""
    starts = (*(f"{name}={{" for name in (*MAPPINGS, "objective")), *(f"{name}." for name in OWN))
    return [f"++{argument}" if argument.startswith(starts) else argument for argument in arguments]


def drop_replaced_names(config: DictConfig, overrides: Iterable[str]) -> None:
    """Take out of the composed ``config`` the names that a mapping given as a whole does not have."""
    prefixes = tuple(f"++{name}={{" for name in MAPPINGS)
    given = [override for override in overrides if override.startswith(prefixes)]
    for override in OverridesParser.create().parse_overrides(given):
        key = override.key_or_group
        value, node = override.value(), OmegaConf.select(config, key)
        if not isinstance(value, dict) or not isinstance(node, DictConfig):
            continue
        names = {str(name) for name in value}
        with open_dict(node):
            for name in [name for name in node if str(name) not in names]:
                del node[name]
