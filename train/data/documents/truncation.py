"""Where a dialogue ends that is too long for a sequence. Pages are cut into pieces, dialogues are not.

A question whose picture stood in another sequence teaches nothing, so a dialogue keeps its beginning: up to the last
answer that fits whole, else into its first answer. One whose first answer lies beyond the limit is left out. Answers
hold no pictures, so no picture is ever cut.

Legend: D documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .packing import Answers, Lengths, Piece, best_fit, cut_documents


def kept_tokens(lengths: Lengths, max_tokens: int, max_images: int) -> np.ndarray:
    """Tokens of each dialogue that are used, 0 for one that is left out, -1 for pages; int64 [D]."""
    kept = np.full(len(lengths.tokens), -1, np.int64)
    if lengths.answers is None:
        return kept
    answers, images = lengths.answers, lengths.offsets
    for document in np.flatnonzero(np.diff(answers.offsets)):
        first, last = answers.offsets[document], answers.offsets[document + 1]
        ends = answers.ends[first:last]
        limit = max_tokens
        if images[document + 1] - images[document] > max_images:
            limit = min(limit, int(lengths.image_starts[images[document] + max_images]))
        if lengths.tokens[document] <= limit:
            kept[document] = lengths.tokens[document]
        elif (ends <= limit).any():
            kept[document] = ends[ends <= limit].max()
        elif answers.starts[first] < limit:
            kept[document] = limit
        else:
            kept[document] = 0
    return kept


def pack_dialogues(lengths: Lengths, max_tokens: int, max_images: int, kept: np.ndarray) -> list[list[Piece]]:
    """Pack a window that holds dialogues: as many sequences as they need, and no dialogue in two.

    Args:
        kept: of :func:`kept_tokens`.
    """
    pieces: list[Piece] = []
    for piece in cut_documents(_pages(lengths, kept), max_tokens, max_images):
        pieces.append(piece)
    for document in np.flatnonzero(kept > 0):
        first, last = lengths.offsets[document], lengths.offsets[document + 1]
        shown = int((lengths.image_starts[first:last] < kept[document]).sum())
        pieces.append(Piece(int(document), 0, int(kept[document]), 0, shown))
    return best_fit(pieces, max_tokens, max_images)


def _pages(lengths: Lengths, kept: np.ndarray) -> Lengths:
    """The same documents, dialogues without their tokens: they are placed as they are."""
    page = kept < 0
    images = np.where(page, np.diff(lengths.offsets), 0)
    which = np.repeat(page, np.diff(lengths.offsets))
    return Lengths(
        np.where(page, lengths.tokens, 0),
        lengths.image_starts[which],
        np.concatenate([[0], np.cumsum(images)]),
    )


def join_lengths(parts: Sequence[Lengths]) -> Lengths:
    """The documents of several shards, one after the other."""
    answers = None
    if any(part.answers is not None for part in parts):
        held = [Answers.none(len(part.tokens)) if part.answers is None else part.answers for part in parts]
        answers = Answers(
            np.concatenate([part.starts for part in held]),
            np.concatenate([part.ends for part in held]),
            _joined_offsets([part.offsets for part in held]),
        )
    return Lengths(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.image_starts for part in parts]),
        _joined_offsets([part.offsets for part in parts]),
        answers,
    )


def _joined_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    offsets = [np.zeros(1, np.int64)]
    for part in parts:
        offsets.append(part[1:] + offsets[-1][-1])
    return np.concatenate(offsets)
