"""What the next token must, must not or should rather be: penalties, bans and biases on logits.

Each is a function (ids [R, T], scores [R, V]) -> scores, in the order and with the meaning that they have in
Transformers' ``generate``.

Legend: R rows (sequences, or beams of them), T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

_NEVER = float("-inf")


def ban(ids: Iterable[int]) -> LogitsProcessor:
    """Never these tokens."""
    banned = sorted(set(ids))

    def apply(_: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, [token for token in banned if token < scores.shape[1]]] = _NEVER
        return scores

    return apply


def until(length: int, inner: LogitsProcessor) -> LogitsProcessor:
    """``inner`` while fewer than ``length`` tokens are there."""
    return lambda ids, scores: inner(ids, scores) if ids.shape[1] < length else scores


def at(length: int, inner: LogitsProcessor) -> LogitsProcessor:
    """``inner`` when exactly ``length`` tokens are there."""
    return lambda ids, scores: inner(ids, scores) if ids.shape[1] == length else scores


def force(token: int | Sequence[int]) -> LogitsProcessor:
    """Only this token, or only one of these."""
    tokens = [token] if isinstance(token, int) else list(token)

    def apply(_: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, _NEVER)
        forced[:, tokens] = 0.0
        return forced

    return apply


def repetition(
    penalty: float, prompt_only: Tensor | None = None, ignored: Tensor | None = None
) -> LogitsProcessor:
    """Divide positive and multiply negative logits of tokens seen before (Keskar et al. 2019).

    Args:
        prompt_only: these ids [R, T] are what was seen, instead of all so far.
        ignored: int64 [R], how many tokens at the start of each row are padding.
    """

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        seen = ids if prompt_only is None else prompt_only
        if seen.shape[1] == 0:
            return scores
        # One more column stands for what is not looked at.
        wide = torch.cat((scores, scores.new_zeros(len(scores), 1)), 1)
        if ignored is not None:
            places = torch.arange(seen.shape[1], device=seen.device)
            seen = seen.masked_fill(places < ignored[:, None], scores.shape[1])
        found = wide.gather(1, seen)
        found = torch.where(found < 0, found * penalty, found / penalty)
        return wide.scatter(1, seen, found)[:, :-1]

    return apply


def no_repeated_ngrams(size: int, prompt_only: Tensor | None = None) -> LogitsProcessor:
    """Ban what would complete an n-gram a second time (of ``prompt_only`` ids [R, T], where given)."""

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        rows = ids.tolist()
        source = rows if prompt_only is None else prompt_only.tolist()
        return _ban(
            scores, [repeated_ngram_ends(row, size, old) for row, old in zip(rows, source, strict=True)]
        )

    return apply


def repeated_ngram_ends(row: Sequence[int], size: int, source: Sequence[int] | None = None) -> list[int]:
    """Tokens that would complete an n-gram that ``source`` (the row itself by default) already holds."""
    source = row if source is None else source
    if len(row) + 1 < size:
        return []
    prefix = tuple(row[len(row) - size + 1 :])
    starts = range(len(source) - size + 1)
    return [source[i + size - 1] for i in starts if tuple(source[i : i + size - 1]) == prefix]


def sequence_bias(biases: Mapping[Any, float] | Sequence[Any]) -> LogitsProcessor:
    """Add a number to a token, or to the last of several ids where the others have just been written.

    Args:
        biases: ids (a tuple) to number, or a list of [ids, number].

    Raises:
        ValueError: there is none, or a sequence is empty.
    """
    pairs = list(biases.items()) if isinstance(biases, Mapping) else [(ids, number) for ids, number in biases]
    if not pairs or not all(len(ids) for ids, _ in pairs):
        raise ValueError("sequence_bias (or bad_words_ids) needs sequences of at least one id.")

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for words, number in pairs:
            *before, last = (int(word) for word in words)
            if len(before) > ids.shape[1] or last >= scores.shape[1]:
                continue
            if before:
                tail = ids[:, -len(before) :]
                match = (tail == torch.tensor(before, device=ids.device)).all(1)
                scores[:, last] += torch.where(match, number, 0.0).to(scores)
            else:
                scores[:, last] += number
        return scores

    return apply


def allowed_by(choose: Callable[[int, Tensor], Sequence[int]], beams: int) -> LogitsProcessor:
    """Only what ``choose(prompt number, ids [T])`` allows.

    Raises (when called):
        ValueError: it allows nothing.
    """

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, _NEVER)
        for row, sequence in enumerate(ids):
            allowed = list(choose(row // beams, sequence))
            if not allowed:
                raise ValueError(
                    f"prefix_allowed_tokens_fn allowed no token for prompt {row // beams}; return at least one (the "
                    "end token, say)."
                )
            mask[row, allowed] = 0.0
        return scores + mask

    return apply


def growing_end(start: int, factor: float, ends: Sequence[int]) -> LogitsProcessor:
    """Raise the end tokens' logits by ``|logit| * (factor ** n - 1)``, n tokens after ``start``."""

    def apply(ids: Tensor, scores: Tensor) -> Tensor:
        past = ids.shape[1] - start
        if past <= 0 or not ends:
            return scores
        scores = scores.clone()
        scores[:, list(ends)] += scores[:, list(ends)].abs() * (factor**past - 1)
        return scores

    return apply


def without_invalid(_: Tensor, scores: Tensor) -> Tensor:
    """NaN becomes 0, infinities the largest and least numbers."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(0.0, limits.max, limits.min)


def _ban(scores: Tensor, ends: list[list[int]]) -> Tensor:
    rows = [row for row, tokens in enumerate(ends) for _ in tokens]
    if not rows:
        return scores
    scores = scores.clone()
    scores[rows, [token for tokens in ends for token in tokens]] = _NEVER
    return scores
