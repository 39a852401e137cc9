"""What stands beside ``tokenizer.json`` in the files of a checkpoint, as releases of Transformers write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def without_begin(settings: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": ""}`` where the settings say themselves that no token begins a text."""
    return {"bos_token": ""} if settings.get("bos_token", "") is None else {}


def chat_template(find: Callable[[str], Path | None]) -> dict[str, Any]:
    """The template of dialogues where a file of its own holds it, as newer releases write it, by its name."""
    if path := find("chat_template.jinja"):
        return {"chat_template": path.read_text(encoding="utf-8")}
    if path := find("chat_template.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        return (
            {"chat_template": values["chat_template"]}
            if isinstance(values, dict) and "chat_template" in values
            else {}
        )
    return {}


def extra_tokens(tokenizer: Any) -> list[Any]:
    """The additional special tokens of a tokenizer of Transformers, whatever its release calls them."""
    mapped = getattr(tokenizer, "special_tokens_map", {}) or {}
    return list(
        mapped.get("additional_special_tokens") or getattr(tokenizer, "extra_special_tokens", None) or []
    )


def content_of(token: Any) -> str | None:
    """A special token is written as a string or as an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
