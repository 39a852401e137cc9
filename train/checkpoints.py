"""What ``checkpoint=`` may name: a run directory, a ``.ckpt``, a sharded one, or a ``save_pretrained`` folder."""

from __future__ import annotations

import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.archives import check_layers, check_tensor
from ..models.inside import inside
from ..models.received import blaming, read_settings
from .callbacks.checkpoint import damage, is_checkpoint, newest_sound_checkpoint
from .module import STATE_KEY
from .runs import CHECKPOINTS, MODEL
from .sharded_checkpoint import open_sharded, read_sharded
from .weight_average import AVERAGE, TENSORS

PREFIX = "model."
# Model and processor class by model_type.
FAMILIES = {
    "groupvit": ("GroupViTModel", "GroupViTProcessor"),
    "idefics": ("IdeficsForVisionText2Text", "IdeficsProcessor"),
}


def load_pretrained(path: str | Path, *, average: bool = True) -> tuple[nn.Module, Any]:
    """Load the model and its processor, in evaluation mode on the CPU.

    Args:
        path: a run directory (its exported model, else its newest sound checkpoint), a ``.ckpt``, a sharded
            checkpoint directory, or a folder with ``config.json`` and weights.
        average: take a checkpoint's averaged weights where it has some (``optim.ema_decay``), not those of its step.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no checkpoint, or one of another program.
    """
    found = locate(path)
    if (found / "config.json").exists():
        model, processor = _from_folder(found)
    else:
        model, processor = _from_checkpoint(found, average)
    return model.eval(), processor


def locate(path: str | Path) -> Path:
    """The ``save_pretrained`` folder or the checkpoint (a ``.ckpt`` or a sharded one) that ``path`` stands for."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint={path} does not exist; give a run directory, a checkpoint or a save_pretrained folder."
        )
    if is_checkpoint(path):
        if path.is_dir() and (problem := damage(path)):
            raise ValueError(f"checkpoint={path} is damaged ({problem}); give the one before it.")
        return path
    for folder in (path, path / MODEL):
        if (folder / "config.json").exists():
            return folder
    for folder in (path / CHECKPOINTS, path):
        newest = newest_sound_checkpoint(folder)
        if newest is not None:
            return newest
    raise ValueError(
        f"checkpoint={path} holds neither config.json with weights nor checkpoints; give a run directory, a .ckpt "
        "or a save_pretrained folder."
    )


def model_type(path: str | Path) -> str:
    """Which of :data:`FAMILIES` a checkpoint holds, without loading its weights.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`.
    """
    found = locate(path)
    if (found / "config.json").exists():
        name = _config(found).get("model_type")
    else:
        name = (open_sharded if found.is_dir() else read_state)(found)[STATE_KEY]["family"]
    _family(str(name), found)
    return str(name)


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


def _family(name: str, path: Path) -> tuple[Any, Any]:
    if name not in FAMILIES:
        raise ValueError(f"checkpoint={path} holds a {name!r} model; known are {', '.join(FAMILIES)}.")
    module = import_module(f"..models.{name}", __package__)
    model, processor = FAMILIES[name]
    return getattr(module, model), getattr(module, processor)


def _config(folder: Path) -> dict[str, Any]:
    return read_settings(folder / "config.json")


def _from_folder(folder: Path) -> tuple[nn.Module, Any]:
    model_class, processor_class = _family(str(_config(folder).get("model_type")), folder)
    return model_class.from_pretrained(folder), processor_class.from_pretrained(folder)


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
    check_layers(config, sum(value.untyped_storage().nbytes() for value in weights.values()), path)
    with torch.device("meta"):
        model = model_class(config)
    if saved["family"] == "idefics":
        from .lora import merge_saved_adapters

        weights = merge_saved_adapters(weights, saved.get("lora_scale"), str(path))
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
    with tempfile.TemporaryDirectory() as folder:
        for name, text in saved["processor"].items():
            inside(folder, Path(name).name).write_text(text, encoding="utf-8")
        processor = processor_class.from_pretrained(folder)
    return model, processor


def processor_files(processor: Any) -> dict[str, str]:
    """The files that ``processor.save_pretrained`` writes, name to text, so that a checkpoint can hold them."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
