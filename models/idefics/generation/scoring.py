"""How likely a prompt is to be continued by each of many texts: the prompt is read once.

The continuations stand side by side behind the prompt's cached keys, and each token sees the prompt and its own
continuation alone. So neither the keys of the prompt nor those of its images are ever copied, whatever the number of
continuations.

Legend: B prompts, T tokens of the prompt, C continuations, M tokens of the continuations read together, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder
from .protocol import GeneratingModel


@torch.no_grad()
def score_continuations(
    model: GeneratingModel,
    continuations: Sequence[Sequence[int]],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    tokens_at_once: int = 512,
    **images: Tensor,
) -> Tensor:
    """Log-probability of every continuation of every prompt.

    Args:
        model: in evaluation mode.
        continuations: token ids of each, one at least.
        input_ids, attention_mask: int [B, T], as ``generate`` takes them; padding may stand on either side.
        tokens_at_once: M at most, or one continuation where that is longer.
        images: ``pixel_values`` (or embeddings) and ``image_attention_mask``; continuations see what the last token
            of their prompt sees.

    Returns:
        float64 [B, C], the sum over a continuation's tokens of log p(token | what precedes it).

    Raises:
        ValueError: a continuation is empty, or the inputs do not fit the model.
    """
    if not continuations or not all(continuations):
        raise ValueError("A continuation is empty; give at least one, each of at least one token.")
    chunks = list(_chunks([list(ids[:-1]) for ids in continuations], tokens_at_once))
    room = max((sum(len(ids) for _, ids in chunk) for chunk in chunks), default=0)
    length = input_ids.shape[1]
    decoder = Decoder(model, input_ids, attention_mask, dict[str, Any](images), length + room)
    first = decoder.prefill().float().log_softmax(-1)  # [B, V]
    scores = first[:, [ids[0] for ids in continuations]].double()
    for chunk in chunks:
        read = [token for _, ids in chunk for token in ids]
        owner = [number for number, ids in chunk for _ in ids]
        depth = [place for _, ids in chunk for place in range(len(ids))]
        following = [token for number, _ in chunk for token in continuations[number][1:]]
        read, depth, columns, targets = torch.tensor((read, depth, owner, following)).to(input_ids.device)
        logits = decoder.branches(read, depth, columns)  # [B, M, V]
        targets = targets.expand(len(logits), -1)[..., None]
        likely = logits.gather(-1, targets)[..., 0].float() - logits.float().logsumexp(-1)
        scores.index_add_(1, columns, likely.double())
    return scores


def _chunks(parts: list[list[int]], limit: int) -> Iterator[list[tuple[int, list[int]]]]:
    """(number, tokens) of parts that are not empty, in groups of at most ``limit`` tokens or of one part."""
    group: list[tuple[int, list[int]]] = []
    size = 0
    for number, ids in enumerate(parts):
        if group and size + len(ids) > limit:
            yield group
            group, size = [], 0
        if ids:
            group.append((number, ids))
            size += len(ids)
    if group:
        yield group
