"""What an IDEFICS in training makes of held-out documents: losses with and without images, and marked answers.

The loss is the objective's, over all real tokens of ``data.val`` packed as in training; *without images* the same
tokens are predicted from text alone. Answers are scored where documents mark them (see
:mod:`~interloom.train.evaluation.idefics.grounding`). B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...config import TrainConfig
from ...data.documents.dataset import DocumentsConfig, DocumentsTransform, documents_loader, open_sources
from ...data.documents.tokenization import DocumentTokenizer
from ...evaluation.idefics.grounding import MAIN_KINDS, Asked, answer, marked
from ...parallel.ranks import of_all_ranks
from ...parallel.sharding import sharded
from .objective import IdeficsModule

_TEXT = ("input_ids", "document_ids", "position_ids")
_ANSWERED_AT_ONCE = 16


class DocumentsValidation:
    """Scores of ``data.val``, over all ranks.

    Args:
        config: of the run.
        rank, world_size: which share of the sequences this process reads.

    Attributes:
        scores: the names of what a call returns.

    Raises:
        ValueError, FileNotFoundError: ``data.val`` is empty, or its shards cannot be used.
    """

    def __init__(self, config: TrainConfig, *, rank: int, world_size: int) -> None:
        assert isinstance(config.data, DocumentsConfig)
        wanted, self.data = config.callbacks.validation, config.data
        if not self.data.val:
            raise ValueError(
                "callbacks.validation reads data.val, which is empty; name held-out documents, +data.val.NAME=[DIR], "
                "or set callbacks.validation.every_steps=0 and no monitor of a val/ score."
            )
        self.rank, self.world_size = rank, world_size
        self.loader = documents_loader(
            self.data, seed=config.seed, rank=rank, world_size=world_size, split="val"
        )
        self.limit = min(wanted.limit or len(self.loader.plan), len(self.loader.plan))
        self.loader.steps = -(-self.limit // self.loader.global_batch_size)
        self.transform = DocumentsTransform(self.data)
        self.sources = list(self.data.val)
        self.asked = self._marked(wanted.scored) if wanted.scored else []
        self.scores = ["loss", "loss_without_images"]
        if len(self.sources) > 1:
            self.scores += [f"{score}/{name}" for score in self.scores[:] for name in self.sources]
        self.scores += ["grounding"] if self.asked else []

    def _marked(self, count: int) -> list[Asked]:
        tokenizer = DocumentTokenizer(self.data.tokenizer)
        shards = open_sources(self.data.val, tokenizer, self.data.max_skip_rate, self.data.retry_seconds)
        return [asked for part in shards.values() for asked in marked(part, tokenizer, count)][:count]

    def __call__(self, module: IdeficsModule, go_on: Callable[[], bool]) -> dict[str, float] | None:
        """Score the module, in evaluation mode; None where ``go_on`` said no between two batches.

        Every rank must call it; ``go_on`` must say the same on each.
        """
        # Of all sources: log-likelihoods with and without images and the z-loss, and labels; then of each source.
        sums = torch.zeros(2, 3 + 2 * len(self.sources), dtype=torch.float64)
        # Without gradients a tower takes its images in portions, of which ranks have different numbers: where its
        # weights are gathered from all of them it must see all at once, as in training.
        with torch.set_grad_enabled(sharded(module.model.parameters())):
            for batch in self.loader:
                if not go_on():
                    return None
                sums += self._sums(module, batch).detach()
        sums = torch.stack(of_all_ranks(sums)).sum(0)
        scores: dict[str, float] = {}
        for name, values in zip(("loss", "loss_without_images"), sums, strict=True):
            nll, z_loss, tokens = values[:3].tolist()
            if not tokens:
                raise ValueError("data.val holds no token to predict; check it with `interloom data verify`.")
            scores[name] = (nll + z_loss) / tokens
            by_source = values[3:].view(2, -1)
            for number, source in enumerate(self.sources if len(self.sources) > 1 else ()):
                if by_source[1, number]:
                    scores[f"{name}/{source}"] = float(by_source[0, number] / by_source[1, number])
        if self.asked:
            scores["grounding"] = self._grounding(module)
        return scores

    def _sums(self, module: IdeficsModule, batch: dict[str, Any]) -> Tensor:
        batch = self.transform(module.transfer_batch_to_device(batch, module.device, 0))
        counts = batch["valid"] & (batch["positions"] < self.limit)
        labels = module.labels(batch).masked_fill(~counts[:, None], -100)
        sources = len(self.sources)
        sums = torch.zeros(2, 3 + 2 * sources, dtype=torch.float64)
        one = torch.ones((), device=labels.device)
        for rows in module.micro_batches(len(labels)):
            part = {name: batch[name][rows] for name in (*_TEXT, "pixel_values", "image_attention_mask")}
            groups = batch["source_ids"][rows]
            shown = module.losses(module.crop_images(dict(part)), labels[rows], one, groups, None)
            text = {name: part[name] for name in _TEXT}
            without = module.losses(text, labels[rows], one, groups, None)
            for number, (_, nll, z_loss, by_source) in enumerate((shown, without)):
                assert by_source is not None
                sums[number, 0] += float(nll.detach())
                sums[number, 1] += 0.0 if z_loss is None else float(z_loss.detach())
                own = torch.zeros(2, sources, dtype=torch.float64)
                own[:, : by_source.shape[1]] = by_source.detach().double().cpu()
                sums[number, 2] += float(own[1].sum())
                sums[number, 3:] += own.flatten()
        return sums

    def _grounding(self, module: IdeficsModule) -> float:
        # A model in shards is gathered by all ranks at once, so that each answers everything.
        alone = sharded(module.model.parameters())
        own = self.asked if alone else self.asked[self.rank :: self.world_size]
        images = module.processor.image_processor
        found = answer(module.model, images, own, "right", _ANSWERED_AT_ONCE) if own else []
        tallies: dict[str, list[int]] = {}
        for asked, tokens in zip(own, found, strict=True):
            for (kind, position, _), token in zip(asked.answers, tokens, strict=True):
                tally = tallies.setdefault(kind, [0, 0])
                tally[0] += token == asked.ids[position]
                tally[1] += 1
        parts = of_all_ranks(tallies)[: 1 if alone else None]
        kinds = {kind for part in parts for kind in part}
        kinds = kinds & set(MAIN_KINDS) or kinds
        right, total = (
            sum(part[kind][place] for part in parts for kind in kinds if kind in part) for place in (0, 1)
        )
        return right / max(total, 1)
