"""Model configuration dataclasses as schemas that Hydra can check overrides against."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

PLAIN = (int, float, str, bool)


def hydra_schema(config: type, **nested: type) -> type:
    """A dataclass with the names and defaults of ``config`` and with types that OmegaConf knows.

    OmegaConf has no ``Sequence`` nor unions of containers: such fields take anything, and ``config`` itself
    checks them when it is built. ``nested`` gives the schemas of fields that are configurations themselves.
    """
    hints = get_type_hints(config)
    columns: list[tuple[str, Any, Any]] = []
    for item in fields(config):
        if item.name in nested:
            columns.append((item.name, nested[item.name], field(default_factory=nested[item.name])))
            continue
        if item.default_factory is not MISSING:
            default = field(default_factory=item.default_factory)
        elif isinstance(item.default, Sequence) and not isinstance(item.default, str):
            default = field(default_factory=lambda values=item.default: list(values))
        else:
            default = field(default=item.default)
        columns.append((item.name, _known(hints[item.name]), default))
    return make_dataclass(f"{config.__name__}Schema", columns)


def hydra_schema_of_kinds(choice: str, kinds: Mapping[str, type]) -> type:
    """One schema for configurations of which a field ``choice`` names the kind.

    It has the fields of the first kind with their defaults, and those of the others, null by default.
    """
    first = next(iter(kinds))
    columns: list[tuple[str, Any, Any]] = [(choice, str, field(default=first))]
    taken = {choice}
    for kind in kinds.values():
        hints = get_type_hints(kind)
        for item in fields(hydra_schema(kind)):
            names = {item.name, *(alias for alias, name in kind.aliases.items() if name == item.name)}
            if names & taken:
                continue
            taken.add(item.name)
            if kind is kinds[first]:
                columns.append((item.name, item.type, _same_default(item)))
            else:
                hint = _known(hints[item.name])
                columns.append((item.name, hint if hint is Any else hint | None, field(default=None)))
    return make_dataclass(f"{kinds[first].__name__}Schema", columns)


def _same_default(item: Field) -> Any:
    if item.default_factory is not MISSING:
        return field(default_factory=item.default_factory)
    return field(default=item.default)


def _known(hint: Any) -> Any:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return hint if all(part in (*PLAIN, type(None)) for part in parts) else Any
