"""The trained model as the folder that users load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import check_room, staged_folder
from .load import load_pretrained


def export(module: Any, weights: dict[str, Tensor] | None, folder: Path) -> None:
    """Write the trained model, or its adapters alone, and its processor as a folder to load, in one rename."""
    if (adapters := module.export_adapters(weights)) is not None:
        needed = sum(tensor.nbytes for tensor in adapters.tensors().values())
        check_room(folder, needed)
        with staged_folder(folder, needed=needed) as staged:
            adapters.write(staged)
            module.processor.save_pretrained(staged)
        return
    state = module.export_state_dict(weights)
    needed = sum(tensor.nbytes for tensor in state.values())
    check_room(folder, needed)
    with staged_folder(folder, needed=needed) as staged:
        module.model.save_pretrained(staged, state_dict=state)
        module.processor.save_pretrained(staged)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Write the model that a checkpoint holds (its average, where it has one) as :func:`export` does."""
    model, processor = load_pretrained(checkpoint)
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    check_room(folder, needed)
    with staged_folder(folder, needed=needed) as staged:
        model.save_pretrained(staged)  # type: ignore[operator]
        processor.save_pretrained(staged)
