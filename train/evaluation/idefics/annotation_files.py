"""What the readers of published annotation files share: JSON with plain errors, and pictures by name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....models.inside import is_inside
from ....models.pictures import picture_suffix
from ...data.names import is_litter
from ...data.text import decode_text


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the path of the data set's annotation file.")
    try:
        return json.loads(decode_text(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again.") from error


def choose_file(
    folder: Path, split: str, wanted: Sequence[str], unwanted: Sequence[str], what: str
) -> Path | None:
    """The one JSON file of a folder (or its folder ``annotations``) whose name holds ``split`` and ``wanted`` words.

    Raises:
        ValueError: there are several.
    """
    places = [
        folder,
        *(p for p in sorted(folder.iterdir()) if p.name.lower() == "annotations" and p.is_dir()),
    ]
    found = [
        path
        for place in places
        for path in sorted(place.glob("*.json"))
        if split.lower() in path.name.lower()
        and all(word in path.name.lower() for word in wanted)
        and not any(word in path.name.lower() for word in unwanted)
    ]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"{folder} holds several files of {what} for split={split} ({names}); give task.{what}=FILE."
        )
    return found[0] if found else None


class PictureFolder:
    """Pictures anywhere below a folder, found by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pictures.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"the folder of pictures {root} does not exist; give task.images=FOLDER.")
        self._paths: dict[str, list[Path]] = {}
        for folder, _, names in sorted(os.walk(self.root, followlinks=True)):
            for name in names:
                path = Path(folder, name)
                if picture_suffix(path) and not is_litter(os.path.relpath(path, self.root)):
                    self._paths.setdefault(name, []).append(path)
                    self._paths.setdefault(path.stem, []).append(path)
        if not self._paths:
            raise ValueError(f"{root} holds no pictures; give task.images=FOLDER.")

    def find(self, *names: str) -> Path | None:
        """The picture with the first of the ``names`` (file name, with or without its suffix) that there is.

        Raises:
            ValueError: two have that name.
        """
        for name in names:
            direct = self.root / name
            if "/" in name and is_inside(self.root, name) and direct.is_file():
                return direct
            paths = self._paths.get(Path(name).name, [])
            if len(paths) > 1:
                raise ValueError(
                    f"{paths[0]} and {paths[1]} have the same name; give task.images=FOLDER with one of them."
                )
            if paths:
                return paths[0]
        return None
