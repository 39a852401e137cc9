"""The one way from a name to a model, for every verb and both families.

A name is a run directory, a ``.ckpt``, a sharded checkpoint, a ``save_pretrained`` folder, a folder of adapters that
``peft`` wrote (its base is loaded the same way), or a hub id (``owner/name``).
"""

from __future__ import annotations

import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.archives import check_layers, check_tensor
from ...models.checkpoint import CheckpointFolder
from ...models.groupvit import GroupViTModel, GroupViTProcessor
from ...models.idefics import IdeficsForVisionText2Text, IdeficsProcessor
from ...models.idefics.architecture import OWN_MODEL_TYPE
from ...models.received import blaming, read_settings
from ..optim.averages import AVERAGE, TENSORS
from ..parallel.ranks import device
from ..runs import CHECKPOINTS, MODEL
from .adapter_folder import base_of, is_adapter, merge, plain_name, read_adapter_config, read_weights
from .contents import BASE, STATE_KEY
from .files_beside import as_folder
from .folder import damage, is_checkpoint, named_checkpoint, newest_sound_checkpoint
from .frozen_base import FrozenBase, read_quantization
from .sharded import open_sharded, read_sharded

PREFIX = "model."
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# Model and processor class by family; what is no plain IDEFICS has a model_type of its own.
FAMILIES = {
    "groupvit": ("GroupViTModel", "GroupViTProcessor"),
    "idefics": ("IdeficsForVisionText2Text", "IdeficsProcessor"),
}


def load_pretrained(
    path: str | Path,
    *,
    average: bool = True,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    processor: bool = True,
) -> tuple[nn.Module, Any]:
    """Load the model and its processor, in evaluation mode.

    Args:
        path: a run directory (its exported model, else its newest sound checkpoint), ``RUN/best`` or ``RUN/last`` for
            one of its checkpoints, a ``.ckpt``, a sharded checkpoint directory, a folder with ``config.json`` and
            weights, a folder of adapters, or a hub id.
        average: take a checkpoint's averaged weights where it has some (``optim.ema_decay``), not those of its step.
        dtype: of the weights; None or ``auto`` keeps the file's.
        device: where they go.
        family: the only one of :data:`FAMILIES` that serves.
        processor: whether there must be one; else None stands for one that a folder lacks.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no checkpoint, one of another program or family, or not to be had from the hub.
    """
    found = locate(path)
    if family is not None and (kind := model_type(path)) != family:
        article = "an IDEFICS" if family == "idefics" else "a GroupViT"
        raise ValueError(
            f"checkpoint={path} holds {'an' if kind[:1] in 'aeiou' else 'a'} {kind} model; "
            f"this needs {article}, so give another one."
        )
    kind_of_weights = dtype_named(dtype)
    if isinstance(found, Path) and is_adapter(found):
        model, made = load_adapter(found, dtype=kind_of_weights, device=device)
    elif isinstance(found, str) or (found / "config.json").exists():
        model, made = _from_folder(found, kind_of_weights, device, processor)
    else:
        model, made = _from_checkpoint(found, average)
        model = model.to(device=device, dtype=kind_of_weights)
    return model.eval(), made


def take_weights(model: Any, loaded: Any, source: str) -> None:
    """Move the weights of a loaded model into one that a run configured, with what belongs to them beside.

    Raises:
        ValueError: they do not fit.
    """
    has, needs = loaded.state_dict(), model.state_dict()
    odd = sorted(
        n for n in {*has, *needs} if n not in has or n not in needs or has[n].shape != needs[n].shape
    )
    if odd:
        raise ValueError(
            f"model.init_checkpoint={source} does not fit model.config ({', '.join(odd[:3])}"
            f"{' …' if len(odd) > 3 else ''}); take over its config.json into the experiment."
        )
    model.load_state_dict(has, assign=True)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # each name was given a parameter of its own
    for name, value in loaded.config.kept().items():
        if not hasattr(model.config, name):
            setattr(model.config, name, value)
    if hasattr(loaded, "generation_config"):
        model.generation_config = loaded.generation_config


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point type by name; None where the file's is to be kept.

    Raises:
        ValueError: there is no such type.
    """
    if dtype is None or dtype == "auto":
        return None
    kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype} is not known; use float32, bfloat16, float16 or auto.")
    return kind


def locate(path: str | Path) -> Path | str:
    """What ``path`` stands for: a ``save_pretrained`` folder, a folder of adapters, a checkpoint (a ``.ckpt`` or a
    sharded one), or, as a string, a hub id.
    """
    name = str(path)
    path = Path(path).expanduser()
    path = named_checkpoint(path) or path
    if not path.exists():
        if _HUB_ID.match(name) and not name.endswith((".ckpt", ".shards")):
            return name
        raise FileNotFoundError(
            f"checkpoint={path} does not exist; give a run directory, a checkpoint, a save_pretrained folder or a hub "
            "id (owner/name)."
        )
    if is_checkpoint(path):
        if path.is_dir() and (problem := damage(path)):
            raise ValueError(f"checkpoint={path} is damaged ({problem}); give the one before it.")
        return path
    for folder in (path, path / MODEL):
        if is_adapter(folder) or (folder / "config.json").exists():
            return folder
    for folder in (path / CHECKPOINTS, path):
        newest = newest_sound_checkpoint(folder)
        if newest is not None:
            return newest
    raise ValueError(
        f"checkpoint={path} holds neither config.json with weights nor checkpoints; give a run directory, a .ckpt, "
        "a save_pretrained folder or a hub id (owner/name)."
    )


def model_type(path: str | Path) -> str:
    """Which of :data:`FAMILIES` a checkpoint holds, without loading its weights.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`.
    """
    return family_of(saved_config(path)["model_type"])


def family_of(kind: Any) -> str:
    """The family of a ``model_type``: its own name, but for that of an IDEFICS that other programs have not."""
    return "idefics" if kind == OWN_MODEL_TYPE else str(kind)


def saved_config(path: str | Path) -> dict[str, Any]:
    """The content of the ``config.json`` that a checkpoint has or stands for, without its weights.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`.
    """
    found = locate(path)
    if isinstance(found, Path) and is_adapter(found):
        return saved_config(base_of(found))
    if isinstance(found, str) or (found / "config.json").exists():
        values = _config(found)
    else:
        saved = (open_sharded if found.is_dir() else read_state)(found)[STATE_KEY]
        values = {"model_type": saved["family"], **saved["config"]}
    _family(str(values.get("model_type")), found)
    return values


def load_processor(path: str | Path) -> Any:
    """The processor of a checkpoint, without its weights.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`, or it has no processor.
    """
    found = locate(path)
    if isinstance(found, Path) and is_adapter(found):
        beside = (found / "preprocessor_config.json").exists()
        found = found if beside else locate(base_of(found))
    processor_class = _family(model_type(path), found)[1]
    if isinstance(found, str) or not is_checkpoint(found):
        return processor_class.from_pretrained(found)
    saved = (open_sharded if found.is_dir() else read_state)(found)[STATE_KEY]
    with as_folder(saved["processor"]) as folder:
        return processor_class.from_pretrained(folder)


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this trainer: plain values and tensors only, nothing in it is executed.

    Of a sharded one the optimiser's moments are left out.
    """
    if path.is_dir():
        return read_sharded(path, optimizer=False)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds, and advises to unpickle what it refused
        raise ValueError(
            f"checkpoint={path} cannot be read as a checkpoint ({type(error).__name__}); it is damaged, or holds more "
            "than tensors and plain values, which is never loaded."
        ) from error
    if not isinstance(state, dict) or STATE_KEY not in state:
        raise ValueError(
            f"checkpoint={path} was not written by this trainer; convert other formats with `interloom convert`."
        )
    return state


def processor_of(path: str | Path) -> Any | None:
    """The processor of a checkpoint, or None where it has none."""
    try:
        return load_processor(path)
    except ValueError:
        return None


def own_images(path: str | Path | None) -> Any | None:
    """The image processor of a checkpoint, or None where there is none."""
    found = None if path is None else processor_of(path)
    return None if found is None else found.image_processor


def model_class(family: str) -> Any:
    """The class of the models of one of :data:`FAMILIES`."""
    return getattr(import_module(f"...models.{family}", __package__), FAMILIES[family][0])


def _family(kind: str, path: Path | str) -> tuple[Any, Any]:
    name = family_of(kind)
    if name not in FAMILIES:
        raise ValueError(f"checkpoint={path} holds a {name!r} model; known are {', '.join(FAMILIES)}.")
    module = import_module(f"...models.{name}", __package__)
    model, processor = FAMILIES[name]
    return getattr(module, model), getattr(module, processor)


def _config(folder: Path | str) -> dict[str, Any]:
    return read_settings(CheckpointFolder(folder).require("config.json"))


def _from_folder(
    folder: Path | str, dtype: torch.dtype | None, device: str | torch.device, needed: bool
) -> tuple[nn.Module, Any]:
    """Model and processor; the processor is None where it cannot be read and is not ``needed``."""
    model_class, processor_class = _family(str(_config(folder).get("model_type")), folder)
    try:
        processor = processor_class.from_pretrained(folder)
    except ValueError:
        if needed:
            raise
        processor = None
    return model_class.from_pretrained(folder, dtype=dtype, device=device), processor


def _from_checkpoint(path: Path, average: bool) -> tuple[nn.Module, Any]:
    state = read_state(path)
    with blaming(f"checkpoint={path}", "give the one before it"):
        return _from_state(state, path, average)


def _from_state(state: dict[str, Any], path: Path, average: bool) -> tuple[nn.Module, Any]:
    if average and AVERAGE in state:
        state["state_dict"] |= state[AVERAGE][TENSORS]
    saved = state[STATE_KEY]
    model_class, processor_class = _family(saved["family"], path)
    weights = {
        name[len(PREFIX) :]: value for name, value in state["state_dict"].items() if name.startswith(PREFIX)
    }
    for name, value in weights.items():
        check_tensor(path, name, value)
    config = model_class.config_class.from_dict(saved["config"])
    if BASE in saved:
        weights = _with_base(weights, FrozenBase.from_dict(saved[BASE], path), path)
    check_layers(config, sum(value.untyped_storage().nbytes() for value in weights.values()), path)
    with torch.device("meta"):
        model = model_class(config)
    if saved["family"] == "idefics":
        from ...models.idefics.adapters import in_one_dtype, merge_saved_adapters

        # As the run exports them.
        weights = in_one_dtype(merge_saved_adapters(weights, saved.get("lora_scale"), str(path)))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing, unexpected = set(expected) - set(weights), set(weights) - set(expected)
    misshapen = {n for n, value in weights.items() if n in expected and value.shape != expected[n]}
    if missing or unexpected or misshapen:
        raise ValueError(
            f"checkpoint={path} does not fit its own config: missing {sorted(missing)[:5]}, unknown "
            f"{sorted(unexpected)[:5]}, of another shape {sorted(misshapen)[:5]}."
        )
    model = model_class(config)  # of no more memory than the file has: every shape has been compared
    model.load_state_dict(weights)
    with as_folder(saved["processor"]) as folder:
        model.read_beside(CheckpointFolder(folder))
        return model, processor_class.from_pretrained(folder)


def _with_base(weights: dict[str, torch.Tensor], base: FrozenBase, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint with the frozen ones that it leaves out, as training computed with them."""
    source = base.require_source(path)
    try:
        model, _ = load_pretrained(source, dtype="float32", family="idefics", processor=False)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"checkpoint={path} holds what trained on {source} and not that itself, which cannot be loaded: {error}"
        ) from error
    return base.complete(model, weights, f"checkpoint={path}")


# Model and processor class by the model_type of config.json; a tower alone has no processor of its own.
_CLASSES = {
    "idefics": ("IdeficsForVisionText2Text", "IdeficsProcessor"),
    "groupvit": ("GroupViTModel", "GroupViTProcessor"),
    "groupvit_text_model": ("GroupViTTextModel", "GroupViTProcessor"),
    "groupvit_vision_model": ("GroupViTVisionModel", "GroupViTProcessor"),
}


def read_any(source: str, dtype: str, *, average: bool = True) -> tuple[Any, Any, Path | None]:
    """The model, its processor if there is a whole one, and the local folder they came from.

    ``average`` as in :func:`~interloom.train.checkpointing.load.load_pretrained`.

    Raises:
        ValueError: there is no checkpoint, or none of these models.
    """
    from ... import models
    from ...models.checkpoint import CheckpointFolder
    from .adapter_folder import is_adapter
    from .folder import is_checkpoint

    kind_of_weights = dtype_named(dtype)
    found = locate(source)
    if isinstance(found, Path) and is_checkpoint(found):
        return *load_pretrained(found, average=average, dtype=dtype), None
    if not average:
        raise ValueError(
            f"--no-average is for a run's checkpoint, a .ckpt or .shards; {found} holds one set of weights."
        )
    if isinstance(found, Path) and is_adapter(found):
        return *load_pretrained(found, dtype=dtype), None
    folder = CheckpointFolder(found)
    kind = family_of(read_settings(folder.require("config.json")).get("model_type"))
    if kind not in _CLASSES:
        raise ValueError(f"{source} holds a {kind!r} model; known are {', '.join(_CLASSES)}.")
    model_name, processor_name = _CLASSES[kind]
    model = getattr(models, model_name).from_pretrained(found, dtype=kind_of_weights)
    try:
        processor = getattr(models, processor_name).from_pretrained(found)
    except ValueError:
        processor = None
    return model, processor, folder.local


def load_for_generation(checkpoint: str, dtype: str, device: str) -> tuple[Any, Any]:
    """An IDEFICS and its processor from whatever ``checkpoint`` names.

    Raises:
        ValueError: it is another model, or nothing that can be loaded.
    """

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_pretrained(checkpoint, dtype=dtype, device=device, family="idefics")


def load_groupvit(checkpoint: str | Path) -> tuple[GroupViTModel, GroupViTProcessor]:
    """Load a GroupViT and its processor onto the fastest device there is.

    Args:
        checkpoint: a run directory, a ``.ckpt``, a ``save_pretrained`` folder, or a hub id (owner/name).

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is no GroupViT.
    """

    place = "cuda" if torch.cuda.is_available() else "cpu"
    return load_pretrained(checkpoint, device=place, family="groupvit")  # type: ignore[return-value]


DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_idefics(checkpoint: str, dtype: str = "auto") -> tuple[IdeficsForVisionText2Text, IdeficsProcessor]:
    """Load an IDEFICS and its processor onto the fastest device there is.

    Args:
        checkpoint: whatever :func:`~interloom.train.checkpointing.load.load_pretrained` takes.
        dtype: of the weights; ``auto`` is bfloat16 on a GPU and float32 elsewhere.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or it is no IDEFICS.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use {', '.join(DTYPES)}.")
    place = device()
    if dtype == "auto":
        dtype = "float32" if place == "cpu" else "bfloat16"
    return load_pretrained(checkpoint, dtype=dtype, device=place, family="idefics")  # type: ignore[return-value]


def load_adapter(
    folder: Path, *, dtype: torch.dtype | None, device: str | torch.device
) -> tuple[nn.Module, Any]:
    """The base model with the adapters merged into its weights, and its processor (the folder's, if it has one).

    Raises:
        FileNotFoundError, ValueError: the base cannot be had, or the adapters do not fit it.
    """
    config = read_adapter_config(folder)
    quantized, own = read_quantization(folder), (folder / "preprocessor_config.json").exists()
    wide = dtype if quantized is None else "float32"
    try:
        model, processor = load_pretrained(base_of(folder), dtype=wide, processor=not own)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"The base model of the adapters in {folder} (base_model_name_or_path) cannot be loaded: {error}"
        ) from error
    if own:
        processor = load_processor(folder)
    rank = config.get("r", 8)
    alpha = config.get("lora_alpha", 8)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    adapters = read_weights(folder)
    if quantized is not None:
        quantized.round(model, map(plain_name, adapters), f"checkpoint={folder}")
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    model.load_state_dict(merge(weights, adapters, scale, str(folder)))
    return model.to(device=device, dtype=dtype if quantized is None else dtype or torch.float32), processor
