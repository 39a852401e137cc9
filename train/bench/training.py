"""The training half of ``interloom bench model``: the same documents, packed here and padded in Transformers.

Documents have the published lengths of OBELICS (log-normal tokens, median 677 and mean 816; 2.5 images on
average; Laurençon et al. 2023, section 4), cut to what a sequence holds. A step is forward, backward and AdamW
over the gated blocks and the resampler, backbones frozen, as the released models were trained. Both sides take
all documents in one batch: Transformers pads each to the longest and each's images to the most, which is what its
processor makes of a list of documents; here they are packed.

Legend: D documents, R sequences, T tokens, N images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.idefics import image_attention_mask
from ..data.documents.packing import Lengths, cut_documents, num_sequences, pack_window
from ..data.documents.simulate import SimulatedDocuments

IMAGE_TOKEN = 1
TRAINED = ("gated_cross_attn_layers.", "perceiver_resampler.")


@dataclass(frozen=True)
class TrainCase:
    """One optimiser step over ``documents`` documents of at most ``max_tokens`` tokens."""

    documents: int = 8
    max_tokens: int = 1024
    max_images: int = 10
    threads: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Document:
    """Token ids int64 [T] in which ``IMAGE_TOKEN`` stands for each image, and images float32 [N, 3, S, S]."""

    ids: Tensor
    images: Tensor


def draw_documents(case: TrainCase, vocab_size: int, image_size: int) -> list[Document]:
    """The documents of a case: functions of its seed, the same on both sides."""
    lengths = SimulatedDocuments(4 * case.documents, 4 * case.documents, case.seed).lengths(0)
    generator = torch.Generator().manual_seed(case.seed)
    documents = []
    for piece in cut_documents(lengths, case.max_tokens, case.max_images)[: case.documents]:
        ids = torch.randint(3, vocab_size, (piece.length,), generator=generator)
        places = lengths.image_starts[lengths.offsets[piece.document] :][piece.first_image :][
            : piece.num_images
        ]
        ids[torch.from_numpy(places - piece.start)] = IMAGE_TOKEN
        images = torch.rand(piece.num_images, 3, image_size, image_size, generator=generator)
        documents.append(Document(ids, images))
    return documents


def padded_batch(documents: list[Document]) -> dict[str, Tensor]:
    """Documents one a row, as Transformers takes them: [D, T], images [D, N, 3, S, S], labels -100 on padding."""
    longest, most = max(len(d.ids) for d in documents), max(1, *(len(d.images) for d in documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    real = torch.zeros_like(ids)
    pixels = torch.zeros(len(documents), most, *documents[0].images.shape[1:])
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = document.ids
        real[row, : len(document.ids)] = 1
        pixels[row, : len(document.images)] = document.images
    return {
        "input_ids": ids,
        "attention_mask": real,
        "pixel_values": pixels,
        "image_attention_mask": image_attention_mask(ids, IMAGE_TOKEN, None, most) * real[..., None],
        "labels": ids.masked_fill(real == 0, -100),
    }


def packed_batch(documents: list[Document], max_tokens: int, max_images: int) -> dict[str, Tensor]:
    """Whole documents packed into rows of ``max_tokens``: [R, T], images [R, N, 3, S, S]."""
    starts = [torch.nonzero(d.ids == IMAGE_TOKEN).flatten().numpy() for d in documents]
    lengths = Lengths(
        np.array([len(d.ids) for d in documents]),
        np.concatenate(starts),
        np.cumsum([0, *(len(s) for s in starts)]),
    )
    fewest = num_sequences(int(lengths.tokens.sum()), len(lengths.image_starts), max_tokens, max_images)
    packs = [[]]
    # A batch is far smaller than the loader's windows: as few rows as hold every document uncut.
    for rows in range(max(1, fewest - 1), len(documents) + 1):
        packs = pack_window(lengths, max_tokens, max_images, rows)
        if sum(map(len, packs)) == len(documents) and len(packs) == rows:
            break
    most = max(1, *(sum(p.num_images for p in pack) for pack in packs))
    ids = torch.zeros(len(packs), max_tokens, dtype=torch.long)
    document_ids = torch.full_like(ids, -1)
    pixels = torch.zeros(len(packs), most, *documents[0].images.shape[1:])
    for row, pack in enumerate(packs):
        end = images = 0
        for number, piece in enumerate(pack):
            document = documents[piece.document]
            place = slice(end, end := end + piece.length)
            ids[row, place] = document.ids
            document_ids[row, place] = number
            pixels[row, images : images + len(document.images)] = document.images
            images += len(document.images)
    return {
        "input_ids": ids,
        "document_ids": document_ids,
        "pixel_values": pixels,
        "image_attention_mask": image_attention_mask(ids, IMAGE_TOKEN, None, most, document_ids=document_ids),
        "labels": ids.masked_fill(document_ids < 0, -100),
    }


class Trainer:
    """One side's model with its optimiser, in training."""

    def __init__(self, model: Any, packed: bool) -> None:
        self.model, self.packed = model.train(), packed
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED))
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.1)
        self.case: TrainCase | None = None
        self.batch: dict[str, Tensor] = {}
        self.tokens = 0

    def prepare(self, case: TrainCase) -> None:
        """Have the case's batch at hand: making it is not part of a step."""
        torch.set_num_threads(case.threads)
        if case == self.case:
            return
        config = self.model.config
        documents = draw_documents(case, config.vocab_size, config.vision_config.image_size)
        self.case, self.tokens = case, sum(len(d.ids) for d in documents)
        self.batch = (
            packed_batch(documents, case.max_tokens, case.max_images)
            if self.packed
            else padded_batch(documents)
        )

    def step(self) -> dict[str, float]:
        """Forward, backward, AdamW: the loss before it, and real tokens a second."""
        batch = self.batch
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - began
        return {
            "loss": float(loss.detach()),
            "tokens_per_second": self.tokens / seconds,
            "fill": self.tokens / batch["input_ids"].numel(),
            "image_fill": float(batch["image_attention_mask"].any(1).float().mean()),
            "tokens": self.tokens,
        }
