"""The files of a ``save_pretrained`` folder beside weights and config.json, kept in a checkpoint as text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...models.inside import inside


@contextmanager
def as_folder(files: dict[str, str]) -> Iterator[Path]:
    """Files that a checkpoint holds as text, in a folder for as long as they are read."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            inside(folder, Path(name).name).write_text(text, encoding="utf-8")
        yield Path(folder)


def files_beside(model: Any, processor: Any) -> dict[str, str]:
    """The files of a ``save_pretrained`` folder beside weights and config.json, name to text, for a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        model.write_beside(Path(folder))
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
