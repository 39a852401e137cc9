"""What names mean: which files are pictures, which are captions, which are nobody's, which are hostile.

One place for the rules that folders, tars, tables and evaluations share.
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Whatever webdataset (txt, text, transcript), img2dataset (txt, json) and caption tools call a caption.
CAPTION_EXTENSIONS = ("txt", "text", "caption", "captions", "cap", "transcript")
JSON_EXTENSIONS = ("json", "jsn")
CAPTION_KEYS = ("caption", "captions", "text", "txt", "title", "alt_text", "sentence", "sentences")
# What operating systems, editors and version control leave beside pictures, and folders of bin and recovery.
_LITTER = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"})
_MAX_NAME = 1024


def is_image(extension: str) -> bool:
    """Whether a member extension (``jpg``, ``0.png``) is that of an image; ``mask.png`` is a label map."""
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS and not extension.endswith("mask.png")


def suffix_of(name: str) -> str:
    """``a/B.JPG`` to ``jpg``; empty where there is none."""
    return os.path.splitext(name)[1][1:].lower()


def is_litter(path: str) -> bool:
    """Whether a path, from its root on, is left alone: hidden (``.ipynb_checkpoints``, ``._a.jpg``) or ``__MACOSX`` and
    its like."""
    parts = (part for part in path.split("/") if part not in ("", ".", ".."))
    return any(part.startswith(".") or part.lower() in _LITTER for part in parts)


def name_problem(name: str) -> str:
    """Why a member's name is not taken, or nothing: letters, marks and spaces of every script are fine."""
    if len(name) > _MAX_NAME:
        return f"{len(name)} characters"
    if name.startswith("/") or ".." in name.split("/"):
        return "leads out of the archive"
    # Cc: control characters; Cs: bytes that are not UTF-8. All else (Zs, Zl, Zp, Cf as in Persian) is a name.
    if not name.isprintable() and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        return "control or undecodable characters"
    return ""


def caption_from_path(path: str) -> str:
    """``animals/birds/red_parrot_01.png`` as ``red parrot, birds, animals``."""
    parts = [os.path.splitext(part)[0] for part in Path(path).parts if part not in (".", "..", "/")]
    words = [" ".join(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", part)) for part in reversed(parts)]
    return ", ".join(dict.fromkeys(filter(None, words)))
