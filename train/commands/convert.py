"""``interloom convert``: any checkpoint that can be read_any, written as safetensors with ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...models.idefics.architecture import beyond_transformers
from ...models.idefics.pretrained import IdeficsPreTrainedModel
from ...models.inside import inside
from ...models.received import check_regular, read_bytes
from ..checkpointing.load import read_any
from ..messages import show

MAX_COPIED = 512 * 2**20  # bytes of a vocabulary that is taken along
FORMATS = ("auto", "transformers", "interloom")
_BESIDE = (
    "*.json",
    "*.model",
    "*.txt",
)  # files of tokenizers and processors, copied where they are not understood


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Checkpoint folder, hub id, run directory or .ckpt.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the file's.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Split weights above this size.")] = "5GB",
    merge_vocabulary: Annotated[
        bool,
        typer.Option(
            help="IDEFICS: make added tokens base tokens, so that Transformers can train the result."
        ),
    ] = False,
    average: Annotated[
        bool,
        typer.Option(
            help="Of a run's checkpoint, the averaged weights where it keeps some (optim.ema_decay), or those of its "
            "step."
        ),
    ] = True,
    format: Annotated[
        str,
        typer.Option(
            help="transformers: what Transformers computes alike, or nothing; interloom: the model as it is; auto: the "
            "first where there is such a model, else the second."
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is in DST already.")] = False,
) -> None:
    """Convert a GroupViT or IDEFICS checkpoint: safetensors or .bin, sharded or not, tf_model.h5, or a
    training run.
    """
    if format not in FORMATS:
        raise ValueError(f"--format={format} is not known; use {', '.join(FORMATS)}.")
    if destination.is_file():
        raise ValueError(f"{destination} is a file; give a folder to write.")
    if destination.resolve() == Path(source).resolve():
        raise ValueError(f"SRC and DST are both {destination}; give another folder to write.")
    if (destination / "config.json").exists() and not overwrite:
        raise ValueError(f"{destination} holds a checkpoint already; pass --overwrite to replace it.")
    model, processor, folder = read_any(source, dtype, average=average)
    if merge_vocabulary:
        if not hasattr(model, "merge_additional_vocabulary"):
            raise ValueError(f"--merge-vocabulary is for IDEFICS; {source} holds a {type(model).__name__}.")
        model.merge_additional_vocabulary()
    beside = files_beside(folder) if processor is None and folder is not None else []
    for_transformers, note = format == "transformers", ""
    if format == "auto":
        for_transformers, note = _what_transformers_has(model)
    model.save_pretrained(destination, max_shard_size=max_shard_size, for_transformers=for_transformers)
    if processor is not None:
        processor.save_pretrained(destination)
    for file in beside:
        (destination / file.name).write_bytes(read_bytes(file, MAX_COPIED))
    size = sum(file.stat().st_size for file in destination.glob("*.safetensors"))
    count = sum(p.numel() for p in model.parameters())
    show(
        f"{destination}: {type(model).__name__}, {count:,} parameters, {size / 2**20:,.1f} MiB"
        + ("" if processor is not None else ", no processor")
        + note
    )


def _what_transformers_has(model: Any) -> tuple[bool, str]:
    """Whether Transformers computes what ``model`` does, and what the user is to be told of it."""
    if not isinstance(model, IdeficsPreTrainedModel):
        return True, ""
    config = model.config
    if reasons := beyond_transformers(config):
        return False, f"; for this program alone, Transformers' IDEFICS has no {'; no '.join(reasons)}"
    if config.num_key_value_heads == config.num_attention_heads:
        return True, ""
    return True, (
        f"; for Transformers, with {config.num_attention_heads} heads of keys for {config.num_key_value_heads} "
        "(--format interloom keeps those)"
    )


def files_beside(source: Path) -> list[Path]:
    """What belongs to tokenizer and processor, to be copied as it is.

    Raises:
        ValueError: a file is a link out of ``source``, a pipe or a device, or too large to be one of these.
    """
    found = [
        inside(source, file.name)
        for pattern in _BESIDE
        for file in sorted(source.glob(pattern))
        if file.name != "config.json" and not file.name.endswith(".index.json")
    ]
    for file in found:
        check_regular(file)
        if file.stat().st_size > MAX_COPIED:
            raise ValueError(f"{file} is larger than the {MAX_COPIED:,} bytes of a file that is taken along.")
    return [file for file in found if file.is_file()]
