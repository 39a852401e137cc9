"""GroupViT's objective: captions against images, and prompts made of the captions' nouns against images.

Xu et al., "GroupViT: Semantic Segmentation Emerges from Text Supervision", CVPR 2022, section 3.3: InfoNCE over
the batch plus the multi-label contrastive loss over K prompts an image, each with its own learned temperature.

B samples, T tokens, K prompts an image, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels import contrastive_loss, multi_label_contrastive_loss
from ....models.groupvit import GroupViTModel, GroupViTProcessor
from ...checkpointing.files_beside import files_beside
from ...checkpointing.load import load_pretrained, take_weights
from ...parallel.ranks import MeanUnderWay, RowsUnderWay, gather_rows
from ...parallel.sharding import Sharder
from ...parallel.sync_batch_norm import synchronise_batch_norm
from ..randomness import initialisation_seed
from ..training_step import TrainingModule
from .accumulation import backward_whole_batch
from .config import GroupViTTrainConfig
from .group_labels import (
    INITIAL_BIAS,
    group_label_loss,
    image_noun_identities,
    noun_identities,
    positive_pairs,
)
from .prompts import draw_noun_prompts
from .sharding import shard_groupvit

MAX_LOGIT_SCALE = 100.0
# What a step tells of itself; a rank's own part is under way to the mean over ranks.
Metric = Tensor | MeanUnderWay


class GroupViTModule(TrainingModule):
    """Trains a :class:`GroupViTModel`.

    Args:
        config: the group ``model`` of the run.
        processor: its tokenizer makes token ids of captions and prompts.
        shared: the arguments of :class:`TrainingModule`.
    """

    model: GroupViTModel

    def __init__(self, config: GroupViTTrainConfig, processor: GroupViTProcessor, **shared: Any) -> None:
        super().__init__(build_model(config, shared["seed"]), **shared)
        self.config = config
        self.processor = processor
        self.multi_label_logit_scale: nn.Parameter | None = None
        if config.multi_label:
            start = float(self.model.config.logit_scale_init_value)
            self.multi_label_logit_scale = nn.Parameter(torch.tensor(start))
        self.multi_label_bias: nn.Parameter | None = None
        if self.by_group:
            self.multi_label_bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        synchronise_batch_norm(self.model)
        if self.trainer_config.compile:
            # The text tower's packed length differs from batch to batch: compiling it would not pay.
            self.model.vision_model.compile()

    @property
    def by_group(self) -> bool:
        """Whether prompts are compared with single groups instead of their mean."""
        return self.config.multi_label > 0 and self.config.multi_label_objective == "groups"

    def description(self) -> dict[str, Any]:
        return {
            "family": "groupvit",
            "config": self.model.config.to_dict(),
            "processor": files_beside(self.model, self.processor),
        }

    def backward_step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        pixel_values: Tensor = batch["pixel_values"]
        first = int(batch["positions"][0])
        texts, identities, positive = self.texts(batch, step)

        def encode(rows: slice) -> tuple[Tensor, Tensor]:
            return self.encode(pixel_values[rows], texts[rows], step, first + rows.start)

        def objective(image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Metric]]:
            return self.objective(image, text, identities, positive)

        chunks = list(self.micro_batches(pixel_values.shape[0]))
        found = backward_whole_batch(chunks, encode, objective, self.manual_backward, self.reduce_gradients)
        metrics = {name: m.wait() if isinstance(m, MeanUnderWay) else m for name, m in found.items()}
        if self.by_group:  # a rank's own part of this loss was differentiated; the user is shown that of all
            labels = self.config.multi_label_weight * metrics["multi_label_loss"]
            metrics["loss"] = metrics["contrastive_loss"] + labels
        return metrics

    def encode(self, pixel_values: Tensor, ids: Tensor, step: int, offset: int) -> tuple[Tensor, Tensor]:
        """Features before the projectors: image [B, C] ([B, G, C] by group), text [B, 1 + K, C'].

        ``ids`` int64 [B, 1 + K, T]; ``offset`` is the global index of the first of the B samples.
        """
        noise = self.noise(step, offset)
        if self.by_group:
            image = self.model.vision_model(pixel_values, noise=noise).last_hidden_state
        else:
            image = self.model.encode_image(pixel_values, noise=noise)
        # A text's noise is that of its place among all texts of the run: 1 + K for every sample.
        noise = self.noise(step, offset * ids.shape[1])
        pooled = self.model.encode_text(ids.flatten(0, 1), noise=noise)
        return image, pooled.unflatten(0, ids.shape[:2])

    def shard(self, sharder: Sharder) -> None:
        shard_groupvit(self.model, sharder)
        sharder.root(self, ["encode", "objective"])

    def objective(
        self,
        image: Tensor,
        text: Tensor,
        identities: Tensor | None = None,
        positive: Tensor | None = None,
        alone: bool = False,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Loss of features before the projectors: image [B, C], text [B, 1 + K, C'], caption first.

        Over several ranks the loss is that of the global batch, and gradients are its derivative times the number
        of ranks (they are averaged later). ``identities`` int64 [B, 1 + K]: texts of equal identity share their
        mass; None makes every text unlike all others. Where prompts are compared with single groups, image is
        [B, G, C] and ``positive`` bool [B, M] says which of the M prompts of all ranks an image's nouns match.
        ``alone``: the B samples are the whole batch, whatever other ranks do.
        """
        model = self.model
        several = not alone and dist.is_initialized() and dist.get_world_size() > 1
        group = dist.group.WORLD if several else None
        groups = None
        if image.dim() == 3:
            # One batch for the projector's statistics: the groups and their mean, which stands for the image.
            projected = model.project_groups(torch.cat([image, image.mean(1, keepdim=True)], dim=1))
            projected = F.normalize(projected, dim=-1)
            groups, images = projected[:, :-1], projected[:, -1]
        else:
            images = F.normalize(model.visual_projection(image), dim=-1)
        texts = F.normalize(model.text_projection(text.flatten(0, 1)), dim=-1).unflatten(0, text.shape[:2])
        scale = model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        loss = contrastive_loss(
            images,
            texts[:, 0],
            scale,
            targets=None if identities is None else identities[:, 0].contiguous(),
            group=group,
        )
        metrics: dict[str, Metric] = {"contrastive_loss": loss, "logit_scale": scale}
        if self.multi_label_logit_scale is not None:
            label_scale = self.multi_label_logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
            if groups is not None and positive is not None and self.multi_label_bias is not None:
                prompts = texts[:, 1:].flatten(0, 1)
                prompts = gather_rows(prompts) if several else prompts
                label_loss = group_label_loss(groups, prompts, positive, label_scale, self.multi_label_bias)
                shown = MeanUnderWay(label_loss) if several else label_loss.detach()
            else:
                label_loss = multi_label_contrastive_loss(
                    images,
                    texts[:, 1:],
                    label_scale,
                    labels=None if identities is None else identities[:, 1:].contiguous(),
                    group=group,
                )
                shown = label_loss
            metrics |= {"multi_label_loss": shown, "multi_label_logit_scale": label_scale}
            loss = loss + self.config.multi_label_weight * label_loss
        return loss, {"loss": loss, **metrics}

    def texts(self, batch: dict[str, Any], step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token ids [B, 1 + K, T] of every caption and its K prompts, and what they have in common.

        That is identities [B, 1 + K] of equal texts, or None; and, for comparison with single groups, bool [B, M]
        whether each of the M prompts of all ranks is about one of the image's nouns, or None.
        """
        rows, about = self.draw_texts(batch, step)
        shape = (len(batch["captions"]), 1 + self.config.multi_label)
        # Under way while this rank turns its texts into ids.
        nouns_of_all = RowsUnderWay(noun_identities(about).to(self.device)) if self.by_group else None
        ids = self.token_ids(rows)
        identities = (
            text_identities(rows).view(shape).to(self.device) if self.config.share_identical else None
        )
        positive = None
        if nouns_of_all is not None:
            images = image_noun_identities(nouns_shown(batch)).to(self.device)
            positive = positive_pairs(nouns_of_all.wait(), images)
        return ids, identities, positive

    def draw_texts(self, batch: dict[str, Any], step: int) -> tuple[list[str], list[str]]:
        """B * (1 + K) texts, every caption before its K prompts, and the B * K nouns that the prompts are about."""
        rows: list[str] = []
        about: list[str] = []
        positions = batch["positions"].tolist()
        count = self.config.multi_label
        for caption, nouns, position in zip(batch["captions"], batch["nouns"], positions, strict=True):
            rows.append(caption)
            if count:
                drawn = draw_noun_prompts(caption, nouns, count, seed=self.seed, step=step, position=position)
                about += [noun for noun, _ in drawn]
                rows += [prompt for _, prompt in drawn]
        return rows, about

    def token_ids(self, rows: list[str]) -> Tensor:
        """int64 [B, 1 + K, T] of B * (1 + K) texts."""
        ids = self.processor(text=rows, padding=True, truncation=True, return_tensors="pt")["input_ids"]
        return ids.to(self.device).unflatten(0, (-1, 1 + self.config.multi_label))


def nouns_shown(batch: dict[str, Any]) -> list[list[str]]:
    """What each image shows. A caption that stands in for a missing noun is about its own image."""
    return [[*nouns, caption] for nouns, caption in zip(batch["nouns"], batch["captions"], strict=True)]


def text_identities(texts: Sequence[str]) -> Tensor:
    """int64 [n]: equal for equal texts, on whatever rank."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def build_model(config: GroupViTTrainConfig, seed: int) -> GroupViTModel:
    """The model, its weights drawn from the run's seed or read from ``init_checkpoint``.

    Raises:
        ValueError: ``init_checkpoint`` holds another model or one of another shape.
    """
    wanted = config.model_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initialisation_seed(seed))
        model = GroupViTModel(wanted)
    if config.init_checkpoint is None:
        return model
    loaded, _ = load_pretrained(config.init_checkpoint, dtype="float32", family="groupvit", processor=False)
    take_weights(model, loaded, config.init_checkpoint)
    return model
