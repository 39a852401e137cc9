"""``interloom data tokenizer``: a caption tokenizer made of one's own shards."""

from __future__ import annotations

from typing import Annotated

import typer

from ..messages import show


def tokenizer(
    shards: Annotated[str, typer.Argument(help="Folder of shards of pairs, as `data pairs` writes them.")],
    out: Annotated[str, typer.Argument(help="Folder for the tokenizer, for model.tokenizer=OUT.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens at most, single bytes included.")] = 8192,
    max_length: Annotated[int, typer.Option(help="Tokens of the longest caption.")] = 77,
    limit: Annotated[
        int, typer.Option(help="Captions to learn from, evenly spread over the shards.")
    ] = 200_000,
) -> None:
    """Learn a byte-level tokenizer, of CLIP's form, from the captions of shards."""
    from pathlib import Path

    from ..data.pairs.vocabulary import build_tokenizer, captions_of
    from ..data.shards.reader import ShardSet

    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder for the tokenizer.")
    if max_length < 3 or limit < 1:
        raise ValueError(
            f"max_length={max_length} must be 3 tokens or more and limit={limit} captions 1 or more."
        )
    found = ShardSet.open([shards], kind="pairs")
    made = build_tokenizer(captions_of(found, limit), vocab_size=vocab_size, model_max_length=max_length)
    made.save_pretrained(folder)
    show(f"{folder}: {len(made)} tokens; train with model.tokenizer={folder}")
