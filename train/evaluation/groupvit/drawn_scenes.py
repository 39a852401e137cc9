"""Zero-shot segmentation of the demo's held-out scenes: scores and the contact sheet.

Protocol. The soft maps of the grouping stages are multiplied, upsampled to the mask and hardened per pixel,
as in GroupViT (Xu et al., 2022, section 4.1). Each group takes the name whose prompt "a photo of a …" it is
nearest to. The names are the classes and the six backdrops that captions speak of; a group named after a
backdrop is background. So no threshold is needed, and nothing is chosen with the help of masks.
``background="threshold"`` is the paper's rule instead: only classes are named, and a pixel is background
where the softmax over them stays below ``threshold``, fixed beforehand.

A model without grouping names each patch by its own projected feature, and scores are upsampled.

B scenes, H x W pixels of the mask, G groups (or patches), U names, P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.groupvit.templates import SEGMENTATION_TEMPLATE
from ....models.pictures import load_labels, load_rgb
from ..pictures.contact_sheet import draw_contact_sheet

if TYPE_CHECKING:
    from ....models.groupvit import GroupViTModel, GroupViTProcessor

# How background is told apart.
RULES = ("named", "threshold")
# Scenes of the contact sheet: the first held-out ones, whatever the model makes of them.
_SHOWN = 15


@dataclass(frozen=True)
class HeldOut:
    """A batch of held-out scenes: images uint8 [H, W, 3], masks int64 [B, H, W], the class ids of each."""

    images: list[np.ndarray]
    masks: Tensor
    present: list[set[int]]


@torch.no_grad()
def evaluate_demo(
    model: GroupViTModel,
    processor: GroupViTProcessor,
    data_root: str | Path,
    output_dir: str | Path,
    *,
    background: str = "named",
    threshold: float = 0.5,
    batch_size: int = 50,
    sheet: str = "segments.png",
    limit: int | None = None,
) -> dict[str, float]:
    """Score ``model`` on ``data_root``/val and draw ``output_dir``/``sheet``.

    Args:
        model: any GroupViT of one image size.
        processor: its tokenizer and image settings.
        data_root: a folder written by ``interloom data demo``.
        output_dir: where the contact sheet goes.
        background: ``named`` or ``threshold``, see above.
        threshold: of the second; one half is where a class outweighs all others together.
        batch_size: scenes at a time.
        sheet: file name of the contact sheet; empty leaves it out.
        limit: the first so many scenes; None for all.

    Returns:
        ``segmentation/miou`` (mean over the classes and the background), the same under either rule as
        ``segmentation/miou_background_<rule>``, ``segmentation/iou/<class>``,
        ``segmentation/pixel_accuracy``, ``classification/recall`` (share of the objects whose class is among
        the image's n best, n objects being there), and, of a model that groups, ``grouping/best_iou`` (mean
        over objects of the best IoU any single group reaches, whatever its name), ``grouping/sharpness``
        (mean over patches of the largest soft membership) and ``grouping/used`` (groups in use an image).

    Raises:
        FileNotFoundError: `data_root` holds no demo.
        ValueError: an unknown ``background``, or no held-out scenes.
    """
    if background not in RULES:
        raise ValueError(f"background={background!r} is not known; use 'named' or 'threshold'.")
    data_root, output_dir = Path(data_root), Path(output_dir)
    classes, backdrops = (_names(data_root / file) for file in ("classes.txt", "backdrops.txt"))
    model = model.eval()
    device = model.logit_scale.device
    prompts = [SEGMENTATION_TEMPLATE.format(name) for name in [*classes, *backdrops]]
    tokens = processor(text=prompts, padding=True, return_tensors="pt").to(device)
    names = F.normalize(model.text_projection(model.encode_text(tokens["input_ids"])), dim=-1)

    tallies = {rule: torch.zeros(len(classes) + 1, len(classes) + 1, dtype=torch.int64) for rule in RULES}
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    shown: tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]] = ([], [], [])
    for batch in held_out(data_root / "val", batch_size, limit):
        pixels = processor(images=batch.images, return_tensors="pt").to(device)["pixel_values"]
        size = (batch.masks.shape[-2], batch.masks.shape[-1])
        segments = find_segments(model, pixels, names, size)
        scale = float(model.logit_scale.exp())
        by_rule: dict[str, Tensor] = {}
        for rule in RULES:
            ids = name_segments(segments.similarity, len(classes), rule, threshold, scale)
            by_rule[rule] = segments.paint(ids)
            tallies[rule] += confusion(by_rule[rule], batch.masks, len(classes) + 1)
        image_scores = segments.similarity[..., : len(classes)].amax(1)
        for key, values in {
            "classification/recall": _recall(image_scores, batch.present),
            **segments.figures(batch.masks, len(classes)),
        }.items():
            sums[key] = sums.get(key, 0.0) + float(np.sum(values))
            counts[key] = counts.get(key, 0) + len(values)
        if len(shown[0]) < _SHOWN:
            for into, values in zip(
                shown, (batch.images, by_rule[background].numpy(), batch.masks.numpy()), strict=True
            ):
                into.extend(list(values)[: _SHOWN - len(into)])
    tally = tallies[background]
    iou = intersection_over_union(tally)
    metrics = {"segmentation/miou": float(iou.nanmean())}
    metrics |= {
        f"segmentation/miou_background_{rule}": float(intersection_over_union(counted).nanmean())
        for rule, counted in tallies.items()
    }
    metrics |= {
        f"segmentation/iou/{name}": float(iou[i])
        for i, name in enumerate(["background", *classes])
        if not iou[i].isnan()
    }
    metrics["segmentation/pixel_accuracy"] = float(tally.diagonal().sum() / tally.sum())
    metrics |= {key: total / counts[key] for key, total in sums.items()}
    if sheet:
        output_dir.mkdir(parents=True, exist_ok=True)
        title = f"Held-out scenes, segments from captions alone: mIoU {metrics['segmentation/miou']:.3f}"
        draw_contact_sheet(*shown, classes, output_dir / sheet, title=title)
    return metrics


def run(*, checkpoint: str, data: str, output_dir: str | Path, **options: Any) -> dict[str, float]:
    """:func:`evaluate_demo` of whatever ``checkpoint=`` names on the demo in ``data``."""
    from ...checkpointing.load import load_pretrained

    model, processor = load_pretrained(checkpoint)
    return evaluate_demo(cast("GroupViTModel", model), processor, data, output_dir, **options)


def held_out(folder: Path, batch_size: int, limit: int | None = None) -> Iterator[HeldOut]:
    """The scenes of a folder of shards in their order, or the first ``limit`` of them.

    Raises:
        FileNotFoundError, ValueError: no shards there, or a scene without a mask.
    """
    from ...data.shards.reader import ShardReader, ShardSet

    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist; make it with `interloom data demo --out {folder.parent}`."
        )
    shards = ShardSet.open([str(folder)], kind="pairs")
    if len(shards) == 0:
        raise ValueError(f"{folder} holds no scenes; make some with `interloom data demo --val 300`.")
    reader = ShardReader(shards)
    count = len(shards) if limit is None else min(limit, len(shards))
    for start in range(0, count, batch_size):
        records = [reader.read(i) for i in range(start, min(start + batch_size, count))]
        images, masks = [], []
        for record in records:
            if "mask.png" not in record.members:
                raise ValueError(
                    f"{record.name} has no mask.png; evaluate on held-out scenes, which carry masks."
                )
            images.append(np.asarray(load_rgb(record.members["png"], record.name)))
            masks.append(load_labels(record.members["mask.png"], record.name))
        stacked = torch.from_numpy(np.stack(masks)).long()
        present = [set(mask.unique().tolist()) - {0} for mask in stacked]
        yield HeldOut(images, stacked, present)


@dataclass(frozen=True)
class Segments:
    """What a model makes of a batch; S segments an image.

    Attributes:
        similarity: cosine of every segment with every name, [B, S, U].
        members: the segment of every pixel [B, H, W].
        soft: soft assignment of patches to segments [B, S, N], None of a model that does not group.
    """

    similarity: Tensor
    members: Tensor
    soft: Tensor | None

    def paint(self, ids: Tensor) -> Tensor:
        """Pixels [B, H, W] from one number a segment [B, S]."""
        return ids.gather(1, self.members.flatten(1)).view_as(self.members)

    def figures(self, masks: Tensor, num_classes: int) -> dict[str, list[float]]:
        """How the grouping itself fares, names aside; empty without grouping."""
        if self.soft is None:
            return {}
        batch, groups = self.soft.shape[:2]
        image = torch.arange(batch)[:, None, None]
        cells = (image * (num_classes + 1) + masks) * groups + self.members
        size = (batch, num_classes + 1, groups)
        shared = torch.bincount(cells.flatten(), minlength=batch * (num_classes + 1) * groups).view(size)
        truth, found = shared.sum(2, keepdim=True), shared.sum(1, keepdim=True)
        best = (shared / (truth + found - shared).clamp(min=1)).amax(2)[:, 1:]
        return {
            "grouping/best_iou": best[truth[:, 1:, 0] > 0].tolist(),
            "grouping/sharpness": self.soft.amax(1).mean(-1).tolist(),
            "grouping/used": (found > 0).sum((1, 2)).float().tolist(),
        }


def find_segments(model: GroupViTModel, pixels: Tensor, names: Tensor, size: tuple[int, int]) -> Segments:
    """Segments of images [B, 3, h, w] at ``size``; without grouping every pixel is its own."""
    from ....models.groupvit.grouping import grouping_maps

    output = model.vision_model(pixels, output_attentions=True)
    similarity = F.normalize(model.project_groups(output.last_hidden_state), dim=-1) @ names.T
    patch = model.vision_model.embeddings.patch
    grid = (pixels.shape[2] // patch[0], pixels.shape[3] // patch[1])
    if not output.attentions:
        maps = similarity.transpose(1, 2).unflatten(-1, grid)
        maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        own = torch.arange(size[0] * size[1]).view(size).expand(len(pixels), *size)
        return Segments(maps.flatten(2).transpose(1, 2).cpu(), own, None)
    soft = output.attentions[0]
    for attention in output.attentions[1:]:
        soft = attention @ soft
    members = grouping_maps(output.attentions, grid, size).max(1).indices
    return Segments(similarity.cpu(), members.cpu(), soft.cpu())


def name_segments(
    similarity: Tensor, num_classes: int, background: str, threshold: float, scale: float
) -> Tensor:
    """Class ids [..., 0 = background] from similarities [..., U] with the classes' names first."""
    if background == "named":
        best = similarity.argmax(-1)
        return torch.where(best < num_classes, best + 1, 0)
    likely, best = (similarity[..., :num_classes] * scale).softmax(-1).max(-1)
    return torch.where(likely >= threshold, best + 1, 0)


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Pixel counts [num_classes, num_classes]: truth down, prediction across."""
    pairs = truth.flatten() * num_classes + predicted.flatten()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(tally: Tensor) -> Tensor:
    """IoU of each class [C] from pixel counts [C, C]; NaN where a class is neither there nor predicted."""
    shared = tally.diagonal().double()
    return shared / (tally.sum(0) + tally.sum(1) - tally.diagonal())


def _recall(similarity: Tensor, present: list[set[int]]) -> list[float]:
    """1.0 for each object whose class is among its image's n best of [B, classes], else 0.0."""
    hits = []
    for scores, classes in zip(similarity, present, strict=True):
        best = {i + 1 for i in scores.topk(len(classes)).indices.tolist()}
        hits += [float(class_id in best) for class_id in classes]
    return hits


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; make it with `interloom data demo --out {path.parent}`."
        )
    return path.read_text(encoding="utf-8").split()
