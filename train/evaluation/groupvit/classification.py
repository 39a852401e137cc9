"""``interloom eval task=classification``: folders of images, a class each, sorted by what a model says of them.

A GroupViT compares pictures with the classes' prompts, without examples; an IDEFICS is asked for the most likely class
name, after examples or none (:mod:`.log_probability`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ....models.pictures import picture_suffix
from ...checkpointing.load import load_groupvit, model_type
from ...data.decode import decode_file
from ...data.names import is_litter
from ...data.report import BadSample
from ..progress import track
from ..ranks import rank_and_count, runs_on_ranks
from .embeddings import class_embeddings, templates_named
from .labels import read_labels
from .metrics import accuracy

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel, GroupViTProcessor


@torch.no_grad()
def evaluate_classification(
    model: GroupViTModel,
    processor: GroupViTProcessor,
    images: Sequence[tuple[Path, int]],
    names: Sequence[str],
    *,
    templates: Sequence[str],
    batch_size: int = 64,
) -> dict[str, float]:
    """Classify image files by the class whose prompts, averaged, they are nearest to.

    Args:
        model: a GroupViT in evaluation mode.
        processor: its tokenizer and image settings.
        images: path and class of each.
        names: of the classes.
        templates: prompts around a name.
        batch_size: images at a time.

    Returns:
        ``classification/top1``, ``classification/top5``, ``classification/images``, ``classification/chance``.

    Raises:
        ValueError: a file is no image.
    """
    classes = class_embeddings(model, processor, names, templates)
    parts = []
    starts = range(0, len(images), batch_size)
    for start in track(starts, "classifying", len(starts)):
        batch = images[start : start + batch_size]
        pixels = processor(images=[_read(path) for path, _ in batch], return_tensors="pt")["pixel_values"]
        pooled = model.encode_image(pixels.to(model.device))
        parts.append((F.normalize(model.visual_projection(pooled), dim=-1) @ classes.T).cpu())
    truth = torch.tensor([label for _, label in images])
    best = accuracy(torch.cat(parts), truth)
    return {
        "classification/top1": best[1],
        "classification/top5": best[5],
        "classification/images": float(len(images)),
        "classification/chance": 1.0 / len(names),
    }


@runs_on_ranks
def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    labels: str | None = None,
    templates: str = "subset",
    split: str = "val",
    batch_size: int | None = None,
    limit: int | None = None,
    support: str | None = None,
    support_split: str = "train",
    **few_shot: Any,
) -> dict[str, float]:
    """The task of ``conf/task/classification.yaml``, whose comments say what the options are.

    Raises:
        FileNotFoundError, ValueError: the checkpoint, the data or the labels are missing or do not fit.
    """
    if data is None:
        raise ValueError("data is not set; give data=FOLDER with a folder of images a class.")
    images, folders = image_folders(data, split)
    names = [name.replace("_", " ") for name in folders] if labels is None else read_labels(labels)
    if len(names) != len(folders):
        raise ValueError(
            f"labels={labels} names {len(names)} classes but {data} has {len(folders)} folders; the list must "
            "name the sorted folders one by one."
        )
    # Evenly spread, so that a limited run sees every class it can.
    step = max(len(images) // limit, 1) if limit else 1
    images = images[::step][:limit]
    if model_type(checkpoint) == "idefics":
        from ..idefics.log_probability import classify

        solved = _support(support, data, support_split, split, folders)
        few_shot["batch_size"] = batch_size or 8
        return classify(checkpoint=checkpoint, images=images, solved=solved, names=names, **few_shot)
    if few_shot.get("shots"):
        raise ValueError(
            "a GroupViT takes no examples; leave shots out, or give the checkpoint of an IDEFICS."
        )
    if rank_and_count()[1] > 1:
        raise ValueError("a GroupViT classifies in one process; leave devices out.")
    chosen = templates_named(templates)
    model, processor = load_groupvit(checkpoint)
    return evaluate_classification(
        model, processor, images, names, templates=chosen, batch_size=batch_size or 64
    )


def _support(
    support: str | None, data: str, support_split: str, split: str, folders: list[str]
) -> list[tuple[Path, int]]:
    """Pictures to choose examples from, with the classes of the evaluated folders; none where there are none."""
    if support is None and (support_split == split or not (Path(data) / support_split).is_dir()):
        return []
    found, names = image_folders(support or data, support_split)
    unknown = sorted(set(names) - set(folders))
    if unknown:
        raise ValueError(
            f"the support has folders that the evaluated classes lack ({', '.join(unknown[:5])}); give folders of the "
            "same names."
        )
    return [(path, folders.index(names[label])) for path, label in found]


def image_folders(data: str | Path, split: str = "val") -> tuple[list[tuple[Path, int]], list[str]]:
    """Image files with their class, and the names of the class folders in sorted order.

    Args:
        data: a folder with a folder a class, or one whose folder ``split`` is such.
        split: see above.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no folders with images in it.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data={data} does not exist; give a folder with a folder of images a class.")
    root = root / split if (root / split).is_dir() else root
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not is_litter(path.name))
    found = [
        (path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.rglob("*"))
        if picture_suffix(path) and not is_litter(str(path.relative_to(root)))
    ]
    if not found:
        raise ValueError(f"{root} has no folders with images; give a folder with a folder of images a class.")
    return found, [folder.name for folder in folders]


def _read(path: Path):
    try:
        return decode_file(path)
    except BadSample as error:
        raise ValueError(f"the image {error}; restore or remove it.") from error
