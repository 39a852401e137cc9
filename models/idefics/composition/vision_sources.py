"""Image towers to begin from: folders of Transformers, or of ours, as the encoder of an IDEFICS.

CLIP of any size, SigLIP and SigLIP 2 of fixed resolution, DINOv2 with registers or without, GroupViT, and the encoder
of another IDEFICS; each as a model of its own or inside a whole one. Weights get the names of :mod:`..towers`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...archives import check_layers
from ...checkpoint import CheckpointFolder, HubOptions, load_into
from ...groupvit.configuration import GroupViTConfig
from ...groupvit.tensorflow import read_tf_weights
from ...normalization import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from ...received import blaming, check_preprocessing, read_settings
from ..architecture import OWN_MODEL_TYPE
from ..image_processing import IdeficsImageProcessor
from ..towers.configuration import IdeficsDinov2Config, VisionConfig, read_vision_config
from ..vision_towers import build_vision_tower

_BEST = "give a folder of CLIP, SigLIP, DINOv2, GroupViT or IDEFICS"


@dataclass
class VisionTower:
    """An image tower that was found.

    Attributes:
        config: of the tower; what ``IdeficsConfig.vision_config`` takes.
        weights: by their names relative to ``model.vision_model.``.
        image_processor: what ``preprocessor_config.json`` is to hold, for `IdeficsImageProcessor.from_dict`.
    """

    config: VisionConfig
    weights: dict[str, Tensor]
    image_processor: dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    """How one family of files becomes a tower.

    Attributes:
        tower: ``model_type`` of the tower's configuration.
        defaults: of fields that a file may leave out, where ours differ.
        prefixes: what the names of the tower's weights may begin with.
        others: what the names of weights begin with that are not the tower's.
        names: parts of names, theirs to ours.
        mean, std: of the pictures, where no file says.
    """

    tower: str
    defaults: Mapping[str, Any]
    prefixes: tuple[str, ...]
    others: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


_CONTRASTIVE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_CLIP = _Kind(
    "idefics_vision",
    {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "patch_size": 32, "hidden_act": "quick_gelu",
    },
    ("vision_model.",),
    _CONTRASTIVE,
)  # fmt: skip
_SIGLIP = _Kind(
    "siglip_vision_model", {}, ("vision_model.",), (*_CONTRASTIVE, "head."), mean=(0.5,) * 3, std=(0.5,) * 3
)
_DINOV2_NAMES = (
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    ("layernorm.", "post_layernorm."),
    ("encoder.layer.", "encoder.layers."),
    (".attention.attention.query.", ".self_attn.q_proj."),
    (".attention.attention.key.", ".self_attn.k_proj."),
    (".attention.attention.value.", ".self_attn.v_proj."),
    (".attention.output.dense.", ".self_attn.out_proj."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".mlp.weights_out.", ".mlp.down_proj."),
)
_DINOV2 = _Kind(
    "dinov2",
    {},
    ("dinov2.", "dinov2_with_registers."),
    ("classifier.", "embeddings.mask_token"),
    _DINOV2_NAMES,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
_DINOV2_REGISTERS = _Kind(
    "dinov2_with_registers",
    {},
    _DINOV2.prefixes,
    _DINOV2.others,
    _DINOV2_NAMES,
    IMAGENET_MEAN,
    IMAGENET_STD,
)
_GROUPVIT = _Kind(
    "groupvit_vision_model", {}, ("vision_model.",), _CONTRASTIVE, mean=IMAGENET_MEAN, std=IMAGENET_STD
)
_IDEFICS = _Kind(
    "",
    {},
    ("model.vision_model.", "vision_model."),
    (
        "model.",
        "lm_head.",
        "embed_tokens.",
        "layers.",
        "norm.",
        "gated_cross_attn_layers.",
        "perceiver_resampler.",
    ),
)
_KINDS = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2_REGISTERS,
    "groupvit": _GROUPVIT,
    "groupvit_vision_model": _GROUPVIT,
    "idefics": _IDEFICS,
    OWN_MODEL_TYPE: _IDEFICS,
}
# Settings of a source that say nothing of the tower: how it is used as a backbone, or what its head is like.
_WITHOUT_EFFECT = frozenset(
    {
        "apply_layernorm", "architectures", "dtype", "out_features", "out_indices", "projection_dim",
        "reshape_hidden_states", "stage_names", "torch_dtype", "use_mask_token", "vision_use_head",
        "_out_features", "_out_indices", "_name_or_path", "id2label", "label2id", "problem_type",
    }
)  # fmt: skip


def read_vision_tower(source: str | os.PathLike[str], hub: HubOptions | None = None) -> VisionTower:
    """Find the image tower of a checkpoint.

    Args:
        source: a folder, a run directory (its ``model`` is taken), or ``owner/name`` on the hub.
        hub: where hub ids are fetched.

    Raises:
        ValueError: there is no such checkpoint, it holds no image tower or one that is not known, or it is damaged or
            not whole.
    """
    folder = CheckpointFolder(source, hub)
    if folder.find("config.json") is None and (Path(source) / "model" / "config.json").is_file():
        folder = CheckpointFolder(Path(source) / "model")
    path = folder.require("config.json")
    values = read_settings(path)
    with blaming(path):
        kind = _kind(folder.name, values)
        config = _configuration(kind, values)
    images = _image_processor(folder, kind, config)
    if isinstance(config, IdeficsDinov2Config) and images.image_size != config.image_size:
        # Its positions are interpolated to whatever its pictures are.
        config.position_size, config.image_size = config.position_grid * config.patch_size, images.image_size
    elif images.image_size != config.image_size:
        warnings.warn(
            f"{folder.name} prepares pictures of {images.image_size} pixels for a tower of {config.image_size}; they "
            f"are made {config.image_size}.",
            stacklevel=2,
        )
        if images.shortest_edge is not None:
            images.shortest_edge = round(images.shortest_edge * config.image_size / images.image_size)
        images.image_size = config.image_size
    return VisionTower(config, _weights(folder, kind, config), images.to_dict())


def _kind(name: str, values: Mapping[str, Any]) -> _Kind:
    """What a ``config.json`` is for.

    Raises:
        ValueError: nothing that is known as an image tower.
    """
    found = values.get("model_type")
    if found in ("siglip2", "siglip2_vision_model"):
        raise ValueError(
            f"{name} is a SigLIP 2 of the NaFlex kind ({found}), which takes images of any shape; take one of fixed "
            "resolution, as siglip2-base-patch16-224."
        )
    if found in _KINDS:
        return _KINDS[found]
    if "vision_config" not in values and ("vocab_size" in values or "n_vocab" in values):
        raise ValueError(f"{name} is a language model ({found}) and has no image tower; {_BEST}.")
    raise ValueError(f"{name} is a {found!r} model, which is no image tower that is known here; {_BEST}.")


def _configuration(kind: _Kind, values: Mapping[str, Any]) -> VisionConfig:
    if kind is _GROUPVIT:
        whole = GroupViTConfig.from_dict(dict(values)) if values.get("model_type") == "groupvit" else None
        own = dict(values) if whole is None else whole.vision_config.to_dict()
    elif kind is _IDEFICS:
        from ..configuration import IdeficsConfig

        return IdeficsConfig.from_dict(dict(values)).vision_config
    else:
        own = values.get("vision_config", values) or {}
    own = {k: v for k, v in own.items() if k not in _WITHOUT_EFFECT}
    return read_vision_config({**kind.defaults, **own, "model_type": kind.tower})


def _image_processor(folder: CheckpointFolder, kind: _Kind, config: VisionConfig) -> IdeficsImageProcessor:
    """How a checkpoint prepares pictures; without its file, as its family does, stretched to the tower's size."""
    path = folder.find("preprocessor_config.json") or folder.find("processor_config.json")
    defaults = {"image_size": config.image_size, "image_mean": kind.mean, "image_std": kind.std}
    if path is None:
        return IdeficsImageProcessor(**defaults)
    values = read_settings(path)
    with blaming(path):
        values = {**values, **(values.get("image_processor") or {})}
        images = IdeficsImageProcessor.from_dict(values)
        for name in ("image_mean", "image_std"):
            if values.get(name) is None:
                setattr(images, name, defaults[name])
        sides = [images.image_size, *([images.shortest_edge] if images.shortest_edge else [])]
        check_preprocessing(path, sides, images.image_mean, images.image_std, images.resample)
    return images


def _weights(folder: CheckpointFolder, kind: _Kind, config: VisionConfig) -> dict[str, Tensor]:
    """The tower's weights by our names, each checked against what the configuration makes of it.

    Raises:
        ValueError: some are missing, unknown, of another shape, or of a damaged file; all are listed.
    """
    files = folder.weight_files({"tf_model.h5": read_tf_weights} if kind is _GROUPVIT else None)
    check_layers(config, sum(file.stat().st_size for file, _ in files), folder.name)
    with torch.device("meta"), blaming(f"config.json of {folder.name}"):
        tower = build_vision_tower(config)
    tensors = (item for file, reader in files for item in reader(file))
    load_into(tower, _renamed(kind, tensors), source=folder.name)
    return {name: tensor.detach() for name, tensor in tower.state_dict().items()}


def _renamed(kind: _Kind, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        within = next((name.removeprefix(p) for p in kind.prefixes if name.startswith(p)), None)
        if within is None and name.startswith(kind.others):
            continue
        name = name if within is None else within
        if name.startswith(kind.others) or name.endswith("embeddings.position_ids"):
            continue
        for theirs, ours in kind.names:
            name = name.replace(theirs, ours)
        reshape = _RESHAPED.get(name)
        tensor = tensor if reshape is None else reshape(tensor)
        if ".mlp.weights_in." in name:  # DINOv2's gated MLP keeps gate and up in one matrix
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield name.replace("weights_in", part), rows.clone()
        else:
            yield name, tensor


_RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "embeddings.class_embedding": lambda t: t.flatten(),
    "embeddings.register_tokens": lambda t: t.flatten(0, -2),
    "embeddings.position_embedding.weight": lambda t: t.flatten(0, -2),
}
