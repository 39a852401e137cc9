"""Record readers, one a format: from what a tool wrote to the documents of which shards are made.

    record, key ─ Format.read ─> Document

Where records lie (files, folders, data sets, tars) is for :mod:`..sources`; what becomes of a document, for
:mod:`..build`. A new format is a module here and a line in :data:`FORMATS`.
"""

from __future__ import annotations

from .format import Format
from .llava import LLAVA
from .messages import MESSAGES
from .mmc4 import MMC4
from .obelics import OBELICS
from .pairs import PAIRS
from .plain_text import TEXT
from .webdataset import WEBDATASET

# In the order in which `auto` asks: the surest marks first.
FORMATS: dict[str, Format] = {
    made.name: made for made in (OBELICS, MMC4, LLAVA, MESSAGES, WEBDATASET, PAIRS, TEXT)
}

__all__ = ["FORMATS", "Format"]
