"""What lies inside a folder: the one rule for names that came with data or with a checkpoint.

A manifest, an index of weights, a table or a document names files; whoever wrote it may have meant any file of this
machine, and what is read from there ends in shards and checkpoints. So such a name counts only where it leads to a
place below the folder that the user gave, links resolved.
"""

from __future__ import annotations

import os
from pathlib import Path


class Outside(ValueError):
    """A name that leads out of its folder, or is no file name at all."""


def inside(folder: str | os.PathLike[str], name: str, *, follow_links: bool = False) -> Path:
    """``folder / name``, if that lies below ``folder``; whether it exists is not asked.

    Absolute names and ``..`` are judged by where they lead. A link counts by what it points at; the store that
    ``huggingface_hub`` links its snapshots to (``blobs`` beside ``snapshots``) counts as inside of a snapshot.

    Args:
        folder: what the user named; it may be a link itself.
        name: what came with the data, relative to ``folder`` or absolute.
        follow_links: judge the name as written, so that links of the folder may lead anywhere.

    Raises:
        Outside: the name leads elsewhere or to the folder itself, or holds NUL, a backslash (what another system
            would take for a separator) or what no file name can hold.
    """
    root = os.path.abspath(folder)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise Outside(f"{name!r} is not a file name; expected the name of a file in {root}.") from None
    if not name or "\0" in name or "\\" in name:
        raise Outside(f"{name!r} is not a file name; expected the name of a file in {root}.")
    path = os.path.join(root, name)
    if follow_links:
        allowed, full = [root], os.path.normpath(path)
    else:
        allowed, full = [os.path.realpath(root)], os.path.realpath(path)
        store, snapshots = os.path.split(os.path.dirname(allowed[0]))
        if snapshots == "snapshots":
            allowed.append(os.path.join(store, "blobs"))
    if not any(full.startswith(place.rstrip(os.sep) + os.sep) for place in allowed):
        raise Outside(f"{name!r} leads out of {root}; only files inside that folder are read.")
    return Path(path)


def is_inside(folder: str | os.PathLike[str], name: str, *, follow_links: bool = False) -> bool:
    """Whether :func:`inside` takes ``name``."""
    try:
        inside(folder, name, follow_links=follow_links)
    except Outside:
        return False
    return True
