"""From logits to the next token: penalties, bans and the draw.

The order and the meaning of the options are those of Transformers' ``generate``, so results carry over.

Legend: R rows (sequences, or beams of them), T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        do_sample: Draw from the distribution; otherwise take its maximum.
        temperature: Divides the logits of a draw.
        top_k: Draw from this many most likely tokens; 0 for all.
        top_p: Draw from the smallest set of most likely tokens that holds this much probability.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen before (Keskar et
            al. 2019); 1 does nothing.
        no_repeat_ngram_size: Ban what would complete an n-gram of this size a second time; 0 does nothing.
        bad_words_ids: Sequences of ids that must not appear.
        processors: Further functions (ids [R, T], scores [R, V]) -> scores, applied before the temperature.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    processors: Sequence[LogitsProcessor] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name, wrong, need in (
            ("temperature", self.temperature <= 0, "a number above 0 (do_sample=False is the limit 0)"),
            ("top_k", self.top_k < 0, "0 for all tokens, or how many to draw from"),
            ("top_p", not 0 < self.top_p <= 1, "a probability above 0 and up to 1"),
            ("repetition_penalty", self.repetition_penalty <= 0, "a number above 0; 1 does nothing"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size < 0, "0 or the size of an n-gram"),
            ("bad_words_ids", any(len(w) == 0 for w in self.bad_words_ids), "sequences of at least one id"),
        ):
            if wrong:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {need}.")

    def process(self, ids: Tensor, scores: Tensor, banned: Sequence[int] = ()) -> Tensor:
        """Penalties and bans on scores [R, V], given the tokens so far ids [R, T]; ``banned`` ids are left
        out.
        """
        if self.repetition_penalty != 1.0:
            seen = scores.gather(1, ids)
            seen = torch.where(seen < 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
            scores = scores.scatter(1, ids, seen)
        if self.no_repeat_ngram_size:
            scores = _ban(
                scores, [repeated_ngram_ends(row, self.no_repeat_ngram_size) for row in ids.tolist()]
            )
        if self.bad_words_ids:
            scores = _ban(scores, [self._bad_ends(row) for row in ids.tolist()])
        if banned:
            scores = scores.clone()
            scores[:, list(banned)] = float("-inf")
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.do_sample:
            scores = self._warp(scores)
        return scores

    def choose(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """Next token int64 [R] from processed scores [R, V]."""
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    def _bad_ends(self, row: list[int]) -> list[int]:
        return [
            word[-1]
            for word in self.bad_words_ids
            if len(word) == 1 or (len(row) >= len(word) - 1 and row[1 - len(word) :] == list(word[:-1]))
        ]

    def _warp(self, scores: Tensor) -> Tensor:
        if self.temperature != 1.0:
            scores = scores / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = scores.sort(dim=-1)
            drop = ordered.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[:, -1] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
        return scores


def repeated_ngram_ends(row: Sequence[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram the row already holds."""
    if len(row) + 1 < size:
        return []
    prefix = tuple(row[len(row) - size + 1 :])
    return [row[i + size - 1] for i in range(len(row) - size + 1) if tuple(row[i : i + size - 1]) == prefix]


def _ban(scores: Tensor, ends: list[list[int]]) -> Tensor:
    rows = [row for row, tokens in enumerate(ends) for _ in tokens]
    if not rows:
        return scores
    scores = scores.clone()
    scores[rows, [token for tokens in ends for token in tokens]] = float("-inf")
    return scores
