"""What every model configuration does: read and write ``config.json`` in the format of Transformers."""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from .received import blaming, read_settings


@dataclass(kw_only=True)
class ModelConfig:
    """Base of the configuration dataclasses.

    A ``config.json`` written by Transformers holds keys of other libraries and releases beside those of the
    model: `from_dict` takes the fields it knows and leaves the rest. `to_dict` writes every field that
    Transformers knows and, of the others (``extensions``), those that differ from their default, so a plain
    model gives a plain file.
    """

    model_type: ClassVar[str] = ""
    extensions: ClassVar[frozenset[str]] = frozenset()

    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a ``config.json``.

        Raises:
            ValueError: ``model_type`` names another model.
        """
        found = values.get("model_type", cls.model_type)
        if found not in (cls.model_type, ""):
            raise ValueError(
                f"config.json is for model_type {found!r}, but {cls.__name__} needs {cls.model_type!r}; "
                "give the path of a matching checkpoint."
            )
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

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
        """Plain JSON values, nested configurations included."""
        result: dict[str, Any] = {"model_type": self.model_type}
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
