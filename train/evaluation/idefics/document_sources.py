"""Which shards of documents an evaluation reads, and whether they were made with the model's tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.documents.dataset import read_document
from ...data.documents.records import Document, Picture
from ...data.documents.tokenization import DocumentTokenizer
from ...data.received_config import read_config
from ...data.report import BadSample
from ...data.shards.reader import ShardReader, ShardSet
from ...data.shards.remote import is_local
from ...runs import CONFIG

if TYPE_CHECKING:
    from ....models.idefics import IdeficsProcessor

_LOOKED_AT = 10


def find_sources(data: str | Path, split: str) -> dict[str, list[str]]:
    """Name of every source to its folders of shards.

    Args:
        data: a folder of shards; a folder whose folder ``split`` is one; a folder of such folders, a source each; or
            the ``config.yaml`` of a run, or the run, whose ``data.val`` is read, or ``data.sources`` where it has none.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: there are no shards.
    """
    root = Path(data)
    if not root.exists():
        raise FileNotFoundError(f"data={data} does not exist; give a folder of shards of documents.")
    if root.is_file() or (root / CONFIG).is_file():
        return _of_config(root if root.is_file() else root / CONFIG)
    own = _shards_of(root, split)
    if own is not None:
        return {root.resolve().name: [str(own)]}
    found = {
        folder.name: [str(shards)]
        for folder in sorted(root.iterdir())
        if folder.is_dir() and (shards := _shards_of(folder, split)) is not None
    }
    if not found:
        raise ValueError(
            f"{root} holds no shards, nor folders with shards; build some with `interloom data documents SOURCE OUT`."
        )
    return found


def _shards_of(folder: Path, split: str) -> Path | None:
    places = (folder / split, folder)
    return next((place for place in places if place.is_dir() and any(place.glob("*.tar"))), None)


def _of_config(path: Path) -> dict[str, list[str]]:
    """What a run read. The file may be anybody's: nothing in it is resolved, and no address in it is contacted."""
    settings = read_config(path).get("data")
    sources = (settings.get("val") or settings.get("sources")) if isinstance(settings, dict) else None
    if not isinstance(sources, dict) or not all(isinstance(folders, list) for folders in sources.values()):
        raise ValueError(
            f"{path} names no documents in data.val or data.sources; give the folder of the shards."
        )
    found = {str(name): [str(folder) for folder in folders] for name, folders in sources.items()}
    for folder in (folder for folders in found.values() for folder in folders):
        if "${" in folder or not is_local(folder) or folder.startswith("pipe:"):
            raise ValueError(
                f"{path} names {folder!r}, which is not a folder here; what a configuration names is not resolved and "
                "not contacted: give the folder of the shards as data=FOLDER."
            )
    return found


def check_tokens(name: str, shards: ShardSet, processor: IdeficsProcessor) -> None:
    """Tokenise one document of a source again with the model's tokenizer.

    Raises:
        ValueError: it comes out different, so ids of the shards mean something else to the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor.tokenizer.save_pretrained(folder)
        tokenizer = DocumentTokenizer(folder)
    reader = ShardReader(shards)
    for sample in range(min(len(shards), _LOOKED_AT)):
        try:
            content = read_document(reader.read(sample, bad=[]))
        except BadSample:
            continue
        parts = tuple(Picture(None) if text is None else str(text) for text in content.get("texts") or ())
        if tokenizer.encode(Document("", parts))[0] != content["ids"]:
            raise ValueError(
                f"source {name!r} ({shards.describe()}) was tokenised with another tokenizer than the checkpoint's; "
                "convert it again with `interloom data documents SOURCE OUT --tokenizer DIR`."
            )
        return
