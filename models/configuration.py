"""What every model configuration does: read and write ``config.json`` in the format of Transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from .foreign_settings import Fixed, refused

_OF_THE_FILE = frozenset({"model_type", "transformers_version"})


@dataclass(kw_only=True)
class ModelConfig:
    """Base of the configuration dataclasses.

    A ``config.json`` written by Transformers holds keys of other libraries and releases beside those of the
    model. `from_dict` refuses those that would make it another model (``fixed`` and `foreign_settings`) and keeps
    the rest as attributes, which `to_dict` writes back. Of the fields that Transformers does not know
    (``extensions``) `to_dict` writes those that differ from their default, so a plain model gives a plain file.
    """

    model_type: ClassVar[str] = ""
    extensions: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[Fixed] = {}

    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a ``config.json``.

        Raises:
            ValueError: ``model_type`` names another model, or a setting would make it one (named).
        """
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
            ValueError: a setting would make it another model (named).
        """
        known = {field.name for field in fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in known})
        config.keep({key: value for key, value in values.items() if key not in known})
        return config

    def keep(self, settings: Mapping[str, Any]) -> None:
        """Keep settings that are no fields as attributes, which `to_dict` writes back.

        Raises:
            ValueError: one of them would change what the model computes.
        """
        if problems := refused(self, self.fixed, settings):
            raise ValueError(
                f"The configuration asks {type(self).__name__} for {', '.join(problems)}; the weights of another "
                "architecture would load and give wrong results. Give a checkpoint of this one, or remove the "
                "setting where the weights were trained without it."
            )
        for name, value in settings.items():
            name = "dtype" if name == "torch_dtype" else name
            # Properties and methods are not replaced; what is private or says who wrote the file is not kept.
            if not name.startswith("_") and name not in _OF_THE_FILE and not hasattr(type(self), name):
                setattr(self, name, value)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read a ``config.json``, or the one in a folder.

        Raises:
            ValueError: the file is missing, is not JSON, or is for another model.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read ({error.strerror}); give a folder with config.json."
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); restore or rewrite it.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object of settings.")
        return cls.from_dict(values)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub: Any) -> Self:
        """Read the ``config.json`` of a checkpoint folder or a hub id.

        Args:
            path: folder, or ``owner/name``.
            **hub: ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

        Raises:
            ValueError: there is no such checkpoint, or it is damaged or for another model.
        """
        from .checkpoint import CheckpointFolder, HubOptions

        return cls.from_json_file(CheckpointFolder(path, HubOptions(**hub)).require("config.json"))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json``; the folder is made if missing."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(self.to_json(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, nested configurations and kept settings included."""
        result: dict[str, Any] = {"model_type": self.model_type}
        names = {field.name for field in fields(self)}
        for name, value in vars(self).items():
            if name not in names and not name.startswith("_") and _is_plain(value):
                result[name] = value
        hidden = {f.name for f in fields(ModelConfig)} | self.extensions
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, ModelConfig):
                value = value.to_dict()
            if isinstance(value, tuple):
                value = list(value)
            if field.name in hidden:
                default = field.default_factory() if field.default_factory is not MISSING else field.default
                if value == (list(default) if isinstance(default, tuple) else default):
                    continue
            result[field.name] = value
        return result

    def to_json(self, **extra: Any) -> str:
        return json.dumps({**self.to_dict(), **extra}, indent=2, sort_keys=True) + "\n"


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
