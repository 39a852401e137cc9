"""The commands that make the folders which recipes name, for messages about folders that are not there."""

from __future__ import annotations

from pathlib import PurePath

# The folder below ``data/`` to the command that makes it.
COMMANDS = {
    "demo": "interloom data demo --out {folder}",
    "demo-interleaved": "interloom data demo --kind interleaved --out {folder}",
    "clipart": "interloom data clipart {folder}",
    # The sources of the published mixtures; docs/data.md says where raw/ comes from.
    "obelics": "interloom data documents HuggingFaceM4/OBELICS {folder} --fetch --tokenizer data/tokenizer",
    "wikipedia": "interloom data documents raw/wikipedia {folder} --format text --tokenizer data/tokenizer",
    "laion": "interloom data documents raw/laion {folder} --format webdataset --tokenizer data/tokenizer",
    "pmd": "interloom data documents raw/pmd {folder} --format webdataset --tokenizer data/tokenizer",
}


def how_to_make(path: object) -> str | None:
    """``make it with `interloom data …` `` for a path inside a folder of a recipe's; None for any other."""
    parts = PurePath(str(path)).parts
    for index in range(len(parts) - 1, -1, -1):
        if parts[index] in COMMANDS and parts[index - 1 : index] in ((), ("data",)):
            folder = str(PurePath(*parts[: index + 1]))
            return f"make it with `{COMMANDS[parts[index]].format(folder=folder)}`"
    return None
