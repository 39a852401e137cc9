"""``interloom eval task=perplexity``: how well documents are predicted, source by source, with and without images.

Every document stands alone, whole up to ``max_tokens`` and cut like in training beyond that. The perplexity is the
exponential of the mean negative log-likelihood over the tokens of the text and the end token; image tokens, which
are easily guessed, are left out unless asked for. *Without images* the same tokens are predicted from text alone, the
marks of images included: the difference is what looking is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ....models.idefics.causal_lm import without_tokens
from ...checkpointing.load import load_idefics
from ...data.documents.dataset import DocumentsConfig, DocumentsFetch, DocumentsTransform
from ...data.documents.order import ShardDocuments
from ...data.documents.packing import Piece, cut_documents
from ...data.report import SkipReport
from ...data.shards.reader import ShardSet
from ..progress import track
from ..ranks import runs_on_ranks, share, summed
from ..results import losses
from .document_sources import check_tokens, find_sources
from .model import prefetched

if TYPE_CHECKING:
    from ....models.idefics import IdeficsForVisionText2Text

_INPUTS = ("input_ids", "document_ids", "labels", "image_attention_mask")
# Sums of a source: negative log-likelihood with and without images, tokens, documents read, their images, and what
# there should have been of both.
_SUMS = 7


@dataclass(frozen=True)
class Alone:
    """The documents of one source, a piece a sequence, longest first: what ``DocumentsFetch`` takes for a plan."""

    pieces: Sequence[tuple[int, Piece]]

    @classmethod
    def of(cls, shards: ShardSet, max_tokens: int, max_images: int, limit: int | None = None) -> Alone:
        """Read the lengths of all documents, or of the first ``limit``, from the indexes."""
        source = ShardDocuments(shards)
        pieces = [
            (shard, piece)
            for shard in range(len(shards.shards))
            for piece in cut_documents(source.lengths(shard), max_tokens, max_images)
            if limit is None or int(shards.starts[shard]) + piece.document < limit
        ]
        return cls(sorted(pieces, key=lambda item: -item[1].length))

    def locate(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(positions)

    def sequence(self, row: int) -> list[tuple[int, int, int, Piece]]:
        """(source, shard in it, sample in that, piece)."""
        shard, piece = self.pieces[int(row)]
        return [(0, shard, piece.document, piece)]


@torch.no_grad()
def evaluate_perplexity(
    model: IdeficsForVisionText2Text,
    sources: Mapping[str, ShardSet],
    config: DocumentsConfig,
    *,
    image_tokens: Tensor | None,
    batch_size: int = 8,
    limit: int | None = None,
    report: SkipReport | None = None,
) -> dict[str, float]:
    """Perplexity of every source and of all together.

    Args:
        model: in evaluation mode.
        sources: shards of kind ``documents``, made with the model's tokenizer.
        config: sizes and normalisation of images, ``max_tokens`` and ``max_images``.
        image_tokens: ids that are not scored; None scores all.
        batch_size: documents at a time.
        limit: the first so many documents of every source.
        report: takes what is left out.

    Returns:
        See :func:`run`.

    Raises:
        ValueError: there is nothing to predict.
    """
    report = SkipReport() if report is None else report
    transform = DocumentsTransform(config)
    sums = torch.zeros(len(sources), _SUMS, dtype=torch.float64)
    plans = {
        name: Alone.of(shards, config.max_tokens, config.max_images, limit)
        for name, shards in sources.items()
    }
    work = [
        (number, DocumentsFetch(plan, {name: sources[name]}, config, pad_id=0, seed=0, train=False), rows)  # type: ignore[arg-type]
        for number, (name, plan) in enumerate(plans.items())
        for rows in share(len(plan.pieces), batch_size)
    ]
    fetched = prefetched(work, lambda item: (item[0], item[2], item[1](np.array(item[2]))))
    for number, rows, batch in track(fetched, "reading", len(work)):
        for reason, name, detail in batch["skipped"]:
            report.add(reason, name, detail)
        pieces = [list(plans.values())[number].pieces[row][1] for row in rows]
        sums[number] += _score(model, batch, transform, image_tokens, pieces)
    whole = summed(sums)
    scores: dict[str, float] = {}
    for name, values in zip([*sources, None], [*whole, whole.sum(0)], strict=True):
        scores |= _named("perplexity" if name is None else f"perplexity/{name}", values)
    if not whole[:, 2].sum():
        raise ValueError("the documents hold no token to predict; check them with `interloom data verify`.")
    return scores


def _score(
    model: IdeficsForVisionText2Text,
    batch: dict[str, Any],
    transform: DocumentsTransform,
    image_tokens: Tensor | None,
    pieces: Sequence[Piece],
) -> Tensor:
    """The sums of one batch, float64 [7]."""
    longest = max(int((batch["document_ids"] >= 0).sum(1).max()), 1)
    valid, read = batch["image_valid"], (batch["document_ids"] >= 0).any(1)
    batch = {name: batch[name].to(model.device) for name in (*_INPUTS, "pixel_values", "image_valid")}
    batch = transform(batch)
    ids, documents, labels, seen = (batch[name][:, :longest] for name in _INPUTS)
    text = {"input_ids": ids, "document_ids": documents, "labels": without_tokens(labels, image_tokens)}
    pictures = {"pixel_values": batch["pixel_values"].to(model.dtype), "image_attention_mask": seen}
    without = model(**text)
    shown = model(**text, **pictures) if bool(seen.any()) else without
    assert shown.loss_sum is not None
    assert without.loss_sum is not None
    assert without.token_count is not None
    figures = [shown.loss_sum, without.loss_sum, without.token_count]
    counts = [read.sum(), valid.sum(), len(pieces), sum(piece.num_images for piece in pieces)]
    return torch.tensor([float(value) for value in (*figures, *counts)], dtype=torch.float64)


def _named(prefix: str, values: Tensor) -> dict[str, float]:
    shown, without, tokens, documents, images, all_documents, all_images = values.tolist()
    scores = {
        f"{prefix}/tokens": tokens,
        f"{prefix}/documents": documents,
        f"{prefix}/images": images,
        f"{prefix}/skipped_documents": all_documents - documents,
        f"{prefix}/skipped_images": all_images - images,
    }
    if tokens:
        scores[f"{prefix}/with_images"] = math.exp(min(shown / tokens, 700.0))
        scores[f"{prefix}/without_images"] = math.exp(min(without / tokens, 700.0))
    return scores


@runs_on_ranks
def run(
    *,
    checkpoint: str,
    output_dir: str | Path,
    data: str | None = None,
    split: str = "val",
    max_tokens: int = 1024,
    max_images: int = 30,
    image_tokens: bool = False,
    image_attention: str = "latest",
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, float]:
    """The task of ``conf/task/perplexity.yaml``, whose comments say what the options are.

    Returns:
        ``perplexity/with_images``, ``perplexity/without_images`` and the counts ``tokens``, ``documents`` (pieces of
        those that were cut), ``images``, ``skipped_documents`` and ``skipped_images``, for all sources together and as
        ``perplexity/SOURCE/…`` for each; ``perplexity/skipped`` losses of any kind.

    Raises:
        FileNotFoundError, ValueError: the checkpoint or the shards are missing or do not fit each other.
    """
    if data is None:
        raise ValueError("data is not set; give data=FOLDER of shards of documents.")
    sources = {
        name: ShardSet.open(folders, kind="documents") for name, folders in find_sources(data, split).items()
    }
    model, processor = load_idefics(checkpoint, dtype)
    for name, shards in sources.items():
        check_tokens(name, shards, processor)
    images = processor.image_processor
    config = DocumentsConfig(
        max_tokens=max_tokens,
        max_images=max_images,
        image_size=images.image_size,
        image_attention=image_attention,
        crop_scale=None,
        mean=list(images.image_mean),
        std=list(images.image_std),
        resample=images.resample,
    )
    names = ("<image>", "<fake_token_around_image>")
    unscored = None if image_tokens else torch.tensor([processor.tokenizer.require(name) for name in names])
    report = SkipReport()
    for shards in sources.values():
        report.merge(shards.report)
    scores = evaluate_perplexity(
        model,
        sources,
        config,
        image_tokens=unscored,
        batch_size=batch_size,
        limit=limit,
        report=report,
    )
    return scores | losses(report, "perplexity")
