"""The published OBELICS schema: ``images`` and ``texts`` in parallel, ``metadata`` of the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..records import parse_record
from .format import Format, listed


def _recognise(record: Mapping[str, Any]) -> bool:
    return listed(record.get("images")) is not None and listed(record.get("texts")) is not None


OBELICS = Format(
    "obelics",
    "images and texts",
    ("images", "texts", "metadata", "general_metadata"),
    _recognise,
    parse_record,
    pages=True,
)
