"""Weights of TensorFlow's GroupViT (``tf_model.h5``) under the names and layouts of PyTorch.

Keras keeps linear kernels as [in, out] and convolutions as [height, width, in, out], and calls the parameters
of norms gamma and beta.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..archives import check_dataset
from ..received import blaming

_ROOTS = ("text_model", "vision_model", "text_projection", "visual_projection", "logit_scale")
_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "embeddings": "weight",
}


def read_tf_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (PyTorch name, tensor) from an HDF5 file saved by Transformers' TensorFlow GroupViT.

    Raises:
        ValueError: the file is damaged or not HDF5, or weights lie in other files or outgrow the file.
    """
    import h5py

    try:
        file = h5py.File(path, "r")
    except Exception as error:  # h5py raises half a dozen kinds for files that are none of its own
        raise ValueError(f"{path} is damaged or not an HDF5 file; fetch it again.") from error
    with file:
        names: list[str] = []
        # Links, soft ones and those into other files, are not visited.
        with blaming(path, "fetch it again"):
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            with blaming(path, "fetch it again"):
                dataset = file[name]
                assert isinstance(dataset, h5py.Dataset)
                check_dataset(path, name, dataset)
                try:
                    tensor = to_torch_layout(name, torch.from_numpy(dataset[()]))
                except OSError as error:
                    raise ValueError(f"{path}: weight {name!r} is damaged; fetch it again.") from error
            yield torch_name(name), tensor


def torch_name(name: str) -> str:
    """``…/encoder/layers_._0/mlp/fc1/kernel:0`` -> ``text_model.encoder.layers.0.mlp.fc1.weight``."""
    parts = name.removesuffix(":0").split("/")
    start = next((i for i, part in enumerate(parts) if part.split(".")[0] in _ROOTS), None)
    if start is None:
        return name
    parts = [re.sub(r"_\._(\d+)$", r".\1", part) for part in parts[start:]]
    # "position_embeddings" is a weight itself; only the bare leaf is Keras's name for a table.
    parts[-1] = _LEAVES.get(parts[-1], parts[-1])
    return ".".join(parts)


def to_torch_layout(name: str, tensor: Tensor) -> Tensor:
    leaf = name.removesuffix(":0").rsplit("/", 1)[-1]
    if leaf == "kernel":
        order = (3, 2, 0, 1) if tensor.dim() == 4 else (1, 0)
        return tensor.permute(*order).contiguous()
    return tensor.reshape(()) if leaf == "logit_scale" else tensor
