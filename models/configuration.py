"""What every model configuration does: read and write ``config.json`` in the format of Transformers."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

import torch

from .files import write_atomically
from .foreign_settings import Fixed, refused
from .received import blaming, read_settings

Config = TypeVar("Config", bound="ModelConfig")


class Implied:
    """A field that follows from the others unless it is given (or given as what follows anyway).

    Reading it gives the value either way; `ModelConfig.stated` tells whether it was given.
    """

    def __init__(self, rule: Callable[[Any], Any]) -> None:
        self.rule = rule

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return None  # what dataclasses take as the default
        given = vars(owner).get(self.name)
        return self.rule(owner) if given is None else given

    def __set__(self, owner: Any, value: Any) -> None:
        vars(owner)[self.name] = value


_OF_THE_FILE = frozenset({"model_type", "transformers_version"})
_ALIKE = 0.87  # a keyword this close to a field is a misspelling of it


@dataclass_transform(field_specifiers=(field,))
def configuration(cls: type[Config]) -> type[Config]:
    """``dataclass`` whose constructor takes further keywords as well (`ModelConfig.keep`)."""
    made = dataclass(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def init(self: Config, *args: Any, **kwargs: Any) -> None:
        kwargs = {cls.aliases.get(name, name): value for name, value in kwargs.items()}
        known = {f.name for f in fields(self)}
        construct(self, *args, **{name: value for name, value in kwargs.items() if name in known})
        self.keep({name: value for name, value in kwargs.items() if name not in known})

    made.__init__ = init
    return made


@dataclass(kw_only=True)
class ModelConfig:
    """Base of the configuration dataclasses.

    The constructor also takes the keywords that configurations of Transformers share and others of a user's own:
    what is no field of the model is kept as an attribute and written back (`keep`).

    A ``config.json`` written by Transformers holds keys of other libraries and releases beside those of the
    model. Those that would make it another model are refused (``fixed`` and `foreign_settings`), the rest is kept
    too. Of the fields that Transformers does not know (``extensions``) `to_dict` writes those that differ from
    their default, so a plain model gives a plain file.
    """

    model_type: ClassVar[str] = ""
    extensions: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[Fixed] = {}
    part_of: ClassVar[str] = ""  # key under which a whole model's file holds this part
    is_encoder_decoder: ClassVar[bool] = False
    sub_configs: ClassVar[Mapping[str, type[ModelConfig]]] = {}
    choices: ClassVar[frozenset[str]] = (
        frozenset()
    )  # parts whose ``model_type`` says which of several they are
    aliases: ClassVar[Mapping[str, str]] = {}  # further names of fields

    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a ``config.json``.

        Raises:
            ValueError: ``model_type`` names another model, or a setting would make it one (named).
        """
        if cls.part_of and isinstance(values.get(cls.part_of), dict):
            return cls.part_from_dict(values[cls.part_of])
        found = values.get("model_type", cls.model_type)
        if found not in (cls.model_type, "", None):
            raise ValueError(
                f"config.json is for model_type {found!r}, but {cls.__name__} needs {cls.model_type!r}; "
                "give the path of a matching checkpoint."
            )
        return cls.part_from_dict(values)

    @classmethod
    def part_from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping inside a ``config.json``, whatever ``model_type`` it carries: the outer one decides.

        Raises:
            ValueError: a setting would make it another model (named), or a field is given twice and differs.
        """
        values = {key: value for key, value in values.items() if key not in _OF_THE_FILE}
        for alias, name in cls.aliases.items():
            given = values.pop(alias, None)
            if given is not None and values.setdefault(name, given) != given:
                raise ValueError(
                    f"{cls.__name__} was given {alias}={given!r} and {name}={values[name]!r}, which are the same "
                    "setting; keep one of them."
                )
        return cls(**values)

    def keep(self, values: Mapping[str, Any]) -> None:
        """Keep values that are no fields as attributes; `to_dict` writes them.

        Raises:
            ValueError: a value would change what the model computes, or follows from the fields and disagrees.
        """
        if problems := refused(self, self.fixed, values):
            raise ValueError(
                f"The configuration asks {type(self).__name__} for {', '.join(problems)}; the weights of another "
                "architecture would load and give wrong results. Give a checkpoint of this one, or remove the "
                "setting where the weights were trained without it."
            )
        names = [f.name for f in fields(self)]
        for name, value in values.items():
            name = "dtype" if name == "torch_dtype" else name
            if isinstance(getattr(type(self), name, None), property):
                found = getattr(self, name)
                if value is not None and value != found:
                    raise ValueError(
                        f"{type(self).__name__} was given {name}={value!r}, but its other settings make it "
                        f"{found!r}; leave {name} out or change those."
                    )
                continue
            if name.startswith("_") or callable(getattr(type(self), name, None)):
                continue  # private to who wrote the file, or the name of a method
            if close := difflib.get_close_matches(name, names, 1, _ALIKE):
                warnings.warn(
                    f"{type(self).__name__} keeps {name}={value!r} but does not use it; did you mean "
                    f"{close[0]}?",
                    stacklevel=4,
                )
            setattr(self, name, value)

    def stated(self, name: str) -> Any:
        """The value of a field; None where it was not given and follows from others."""
        rule = inspect.getattr_static(type(self), name, None)
        if not isinstance(rule, Implied):
            return getattr(self, name)
        given = vars(self).get(rule.name)
        return None if given == rule.rule(self) else given

    def kept(self) -> dict[str, Any]:
        """Attributes that are no fields."""
        known = {f.name for f in fields(self)}
        return {k: v for k, v in vars(self).items() if k not in known and not k.startswith("_")}

    def __iter__(self) -> Iterator[str]:
        """Names of all settings, kept ones too."""
        return iter([*(f.name for f in fields(self)), *self.kept()])

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The configuration of the text part: ``text_config`` where there is one."""
        return getattr(self, "text_config", self)

    def update(self, values: Mapping[str, Any]) -> None:
        """Set several attributes, by their names or aliases."""
        for name, value in values.items():
            setattr(self, self.aliases.get(name, name), value)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read a ``config.json``, or the one in a folder.

        Raises:
            ValueError: the file is missing, is not JSON, or is for another model.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        values = read_settings(path)
        with blaming(path):
            return cls.from_dict(values)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """Read the ``config.json`` of a checkpoint folder or a hub id; a part reads it from a whole model's too.

        Args:
            path: folder, or ``owner/name``.
            **options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``subfolder``; any other is a
                setting that replaces the file's.

        Raises:
            ValueError: there is no such checkpoint, or it is damaged or for another model.
        """
        from .checkpoint import CheckpointFolder, HubOptions

        names = {f.name for f in fields(HubOptions)}
        hub = HubOptions(**{name: value for name, value in options.items() if name in names})
        config = cls.from_json_file(CheckpointFolder(path, hub).require("config.json"))
        return config.with_overrides({name: value for name, value in options.items() if name not in names})

    def with_overrides(self, values: Mapping[str, Any]) -> Self:
        """A copy with some settings replaced; a nested part may be given as the settings that change in it."""
        if not values:
            return self
        result = self.to_dict()
        result.pop("model_type", None)  # it may follow from what changes
        for name, value in values.items():
            name = self.aliases.get(name, name)
            old = result.get(name)
            result[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, Mapping) else value
        return type(self).from_dict(result)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``; the folder is made if missing."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / "config.json", self.to_json())

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write the settings to a file."""
        write_atomically(Path(path), self.to_json())

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict`: what differs from defaults is not told apart."""
        return self.to_dict()

    def to_json_string(self) -> str:
        """The same as text."""
        return self.to_json()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested configurations included."""
        result: dict[str, Any] = {"model_type": self.model_type}
        hidden = {f.name for f in fields(ModelConfig)} | self.extensions
        for item in fields(self):
            value = self.stated(item.name)
            if isinstance(value, ModelConfig):
                value = value.to_dict()
            if isinstance(value, tuple):
                value = list(value)
            if item.name in hidden:
                default = item.default_factory() if item.default_factory is not MISSING else item.default
                if value == (list(default) if isinstance(default, tuple) else default):
                    continue
            result[item.name] = value
        return {**result, **self.kept()}

    def to_json(self, **extra: Any) -> str:
        return json.dumps({**self.to_dict(), **extra}, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """What JSON can hold of a value that it does not know.

    Raises:
        ValueError: it is a function, say, that a file cannot name.
    """
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise ValueError(
        f"The configuration holds {value!r}, which config.json cannot hold; give an activation or another "
        "setting by its name to save it."
    )
