"""What a file of weights may hold: checked from its headers, before bytes are read or memory is taken.

A tensor takes as many bytes in a file as in memory. Whatever promises more (a tensor that repeats its storage, a
compressed archive, an HDF5 data set that is never filled or lies in another file) is made to harm.
"""

from __future__ import annotations

import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_COMPRESSION = 16  # times that filters of HDF5 may shrink weights; real ones shrink to a half
_LAYER = 256  # bytes that names and headers of a layer's weights take at least
_SMALL = 2**20  # bytes that a data set may take however small the file: biases of zeros compress to nothing


def check_archive(path: Path) -> None:
    """Refuse a ``torch.save`` archive whose members are compressed; PyTorch never writes one.

    Raises:
        ValueError: it holds more than its own bytes, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again.") from error
    size = path.stat().st_size
    if (
        any(m.compress_type != zipfile.ZIP_STORED for m in members)
        or sum(m.file_size for m in members) > size
    ):
        raise ValueError(f"{path} unpacks to more than its own {size:,} bytes; fetch it from another source.")


def check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not plain, or that has more elements than stored.

    Raises:
        ValueError: it has.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{path}: weight {name!r} is not a plain dense tensor; save it as one.")
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > stored:
        raise ValueError(
            f"{path}: weight {name!r} of shape {list(tensor.shape)} takes {needed:,} bytes, but {stored:,} are stored; "
            "save it contiguous."
        )


def check_dataset(path: Path, name: str, dataset: Any) -> None:
    """Refuse an HDF5 data set that is not in the file itself, or is far larger than the file.

    Raises:
        ValueError: it is.
    """
    if dataset.external or dataset.is_virtual:
        raise ValueError(
            f"{path}: weight {name!r} takes its bytes from other files; only what is in the file itself is read."
        )
    if dataset.dtype.kind not in "fiub":
        raise ValueError(f"{path}: weight {name!r} is of type {dataset.dtype}; expected numbers.")
    size = path.stat().st_size
    if dataset.nbytes > max(_COMPRESSION * dataset.id.get_storage_size(), _SMALL):
        raise ValueError(
            f"{path}: weight {name!r} of shape {list(dataset.shape)} takes {dataset.nbytes:,} bytes, but the file has "
            f"{size:,}; fetch it from another source."
        )


def check_layers(config: Any, stored: int, source: object) -> None:
    """Refuse a configuration of more layers than the weights beside it can fill, before they are built.

    A layer has at least the four square matrices of its attention, whatever else it has, of a byte an element.

    Args:
        config: the configuration, with those of its parts.
        stored: bytes of all weights.
        source: name of the checkpoint.

    Raises:
        ValueError: it asks for more.
    """
    for part in _parts(config):
        depths = getattr(part, "depths", None) or ()
        layers = max(getattr(part, "num_hidden_layers", None) or 0, sum(depths) + len(depths))
        width = getattr(part, "hidden_size", None) or getattr(part, "embed_dim", None) or 0
        if layers * max(_LAYER, 4 * width * width) > max(stored, _SMALL):
            raise ValueError(
                f"{source} does not fit its configuration: {layers:,} layers of width {width:,} need more than the "
                f"{stored:,} bytes of weights there are; restore config.json."
            )
        depth = getattr(part, "resampler_depth", 0)
        if depth * _LAYER > max(stored, _SMALL):
            raise ValueError(
                f"{source} does not fit its configuration: a resampler of {depth:,} layers needs more than the "
                f"{stored:,} bytes of weights there are; restore config.json."
            )


def _parts(config: Any) -> list[Any]:
    nested = [getattr(config, item.name) for item in fields(config)]
    return [config, *(part for value in nested if is_dataclass(value) for part in _parts(value))]
