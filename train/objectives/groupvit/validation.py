"""What a GroupViT in training makes of held-out pairs: the objective's loss, retrieval, and segments where masks are.

Features of all held-out pairs come together on every rank, in the order of the pairs, each pair once; the loss is then
that of batches of ``data.eval_batch_size`` of them, whatever ranks there are. N pairs, K prompts a pair, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....models.groupvit import GroupViTModel
from ...config import TrainConfig
from ...data.pairs.dataset import PairsConfig, PairsTransform, pairs_loader
from ...data.shards.reader import ShardReader, ShardSet
from ...evaluation.groupvit.drawn_scenes import evaluate_demo
from ...evaluation.groupvit.embeddings import class_embeddings
from ...evaluation.groupvit.metrics import confusion, recall, segmentation_scores
from ...evaluation.groupvit.segmentation import default_protocol, pixel_statistics
from ...evaluation.groupvit.segmentation_data import Shards
from ...evaluation.groupvit.sliding import segment_image
from ...parallel.ranks import of_all_ranks
from ...parallel.sharding import sharded
from .group_labels import image_noun_identities, noun_identities, positive_pairs
from .objective import GroupViTModule, nouns_shown, text_identities

Rows = dict[str, Any]


class PairsValidation:
    """Scores of ``data.val``, over all ranks.

    Args:
        config: of the run.
        rank, world_size: which share of the pairs this process reads.

    Attributes:
        scores: the names of what a call returns.

    Raises:
        ValueError, FileNotFoundError: ``data.val`` is empty, or its shards cannot be used.
    """

    def __init__(self, config: TrainConfig, *, rank: int, world_size: int) -> None:
        assert isinstance(config.data, PairsConfig)
        wanted, self.data = config.callbacks.validation, config.data
        if not self.data.val:
            raise ValueError(
                "callbacks.validation reads data.val, which is empty; give held-out pairs, data.val=[DIR], or set "
                "callbacks.validation.every_steps=0 and no monitor of a val/ score."
            )
        self.rank, self.world_size, self.batch = rank, world_size, self.data.eval_batch_size
        self.loader = pairs_loader(self.data, seed=config.seed, rank=rank, world_size=world_size, split="val")
        self.limit = min(wanted.limit or len(self.loader.plan), len(self.loader.plan))
        self.loader.steps = -(-self.limit // self.loader.global_batch_size)
        self.transform = PairsTransform(self.data, seed=config.seed, train=False)
        self.scored = wanted.scored
        self.scenes = scenes_beside(self.data.val) if self.scored else None
        self.scores = ["loss", "contrastive_loss", "image_to_text_r1", "text_to_image_r1"]
        self.scores += ["multi_label_loss"] if config.model.multi_label else []
        self.scores += ["miou"] if self.scenes is not None else []

    def __call__(self, module: GroupViTModule, go_on: Callable[[], bool]) -> dict[str, float] | None:
        """Score the module, in evaluation mode; None where ``go_on`` said no between two batches.

        Every rank must call it; ``go_on`` must say the same on each.
        """
        own: list[Rows] = []
        for batch in self.loader:
            if not go_on():
                return None
            own += self._features(module, batch)
        parts = of_all_ranks(own)
        rows = sorted((row for part in parts for row in part), key=lambda row: row["position"])
        rows = list(
            {row["key"]: row for row in rows}.values()
        )  # a pair that stood in for another is itself once
        scores = self._losses(module, rows) | self._retrieval(module, rows)
        if self.scenes is not None:
            scores["miou"] = self._miou(module, self.scenes)
        return scores

    def _features(self, module: GroupViTModule, batch: dict[str, Any]) -> list[Rows]:
        batch = self.transform(module.transfer_batch_to_device(batch, module.device, 0))
        texts, about = module.draw_texts(batch, 0)
        ids, prompts = module.token_ids(texts), module.config.multi_label
        chunks = [
            module.encode(batch["pixel_values"][rows], ids[rows], 0, rows.start)
            for rows in module.micro_batches(len(ids))
        ]
        images, features = (torch.cat(part).cpu() for part in zip(*chunks, strict=True))
        positions, shown = batch["positions"].tolist(), nouns_shown(batch)
        return [
            {
                "position": position,
                "key": batch["keys"][row],
                "image": images[row].clone(),
                "text": features[row].clone(),
                "texts": texts[row * (1 + prompts) : (row + 1) * (1 + prompts)],
                "about": about[row * prompts : (row + 1) * prompts],
                "shown": shown[row],
            }
            for row, position in enumerate(positions)
            if bool(batch["valid"][row]) and position < self.limit
        ]

    def _losses(self, module: GroupViTModule, rows: list[Rows]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            image, text = (
                torch.stack([row[name] for row in part]).to(module.device) for name in ("image", "text")
            )
            identities = positive = None
            if module.config.share_identical:
                texts = [text for row in part for text in row["texts"]]
                identities = text_identities(texts).view(text.shape[:2]).to(module.device)
            if module.by_group:
                about = noun_identities([noun for row in part for noun in row["about"]])
                shown = image_noun_identities([row["shown"] for row in part])
                positive = positive_pairs(about, shown).to(module.device)
            _, found = module.objective(image, text, identities, positive, alone=True)
            for name, value in found.items():
                if name.endswith("loss"):
                    assert isinstance(value, Tensor)
                    sums[name] = sums.get(name, 0.0) + float(value) * len(part)
        return {name: value / len(rows) for name, value in sums.items()}

    def _retrieval(self, module: GroupViTModule, rows: list[Rows]) -> dict[str, float]:
        images, texts = [], []
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            image = torch.stack([row["image"] for row in part]).to(module.device)
            image = image.mean(1) if image.dim() == 3 else image
            text = torch.stack([row["text"][0] for row in part]).to(module.device)
            images.append(F.normalize(module.model.visual_projection(image).float(), dim=-1).cpu())
            texts.append(F.normalize(module.model.text_projection(text).float(), dim=-1).cpu())
        captions: dict[str, int] = {}
        first: list[int] = []
        matches: list[set[int]] = []
        for number, row in enumerate(rows):
            caption = row["texts"][0]
            if caption not in captions:
                captions[caption] = len(captions)
                first.append(number)
            matches.append({captions[caption]})
        similarity = torch.cat(images) @ torch.cat(texts)[first].T
        of_text: list[set[int]] = [set() for _ in captions]
        for image, (text,) in enumerate(matches):
            of_text[text].add(image)
        return {
            "image_to_text_r1": recall(similarity, matches, (1,))[1],
            "text_to_image_r1": recall(similarity.T, of_text, (1,))[1],
        }

    def _miou(self, module: GroupViTModule, root: Path) -> float:
        model: GroupViTModel = module.model
        # A model in shards is gathered by all ranks at once, so that each sees every scene.
        alone = sharded(model.parameters())
        rank, world_size = (0, 1) if alone else (self.rank, self.world_size)
        if (
            root.name == "val" and (root.parent / "backdrops.txt").is_file()
        ):  # drawn scenes have a rule of their own
            found = 0.0
            if rank == 0:
                found = evaluate_demo(
                    model, module.processor, root.parent, root, sheet="", limit=self.scored
                )["segmentation/miou"]
            return float(of_all_ranks(found)[0])
        scenes = Shards(root)
        protocol = default_protocol(model.config.vision_config.image_hw[0], scenes.threshold)
        mean, std = pixel_statistics(module.processor)
        names = [name for name in scenes.classes if name != "background"]
        classes = class_embeddings(model, module.processor, names, ("a photo of a {}.",))
        counts = torch.zeros(len(scenes.classes), len(scenes.classes), dtype=torch.int64)
        for number in range(rank, min(self.scored, len(scenes)), world_size):
            scene = scenes.scene(number)
            predicted = segment_image(model, scene.image, classes, protocol, mean, std)
            counts += confusion(predicted, torch.from_numpy(scene.mask), len(scenes.classes))
        if not alone:
            counts = torch.stack(of_all_ranks(counts)).sum(0)
        return segmentation_scores(counts, scenes.classes)["segmentation/miou"]


def scenes_beside(sources: list[str]) -> Path | None:
    """The first folder of held-out shards whose samples carry masks and whose classes are named; None without one."""
    for source in sources:
        folder = Path(source)
        named = any((place / "classes.txt").is_file() for place in (folder, folder.parent))
        if folder.is_dir() and named:
            shards = ShardSet.open([source], kind="pairs")
            if len(shards) and "mask.png" in ShardReader(shards).read(0).members:
                return folder
    return None
