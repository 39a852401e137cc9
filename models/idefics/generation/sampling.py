"""From logits to the next token: penalties, bans and the draw.

The order and the meaning of the options are those of Transformers' ``generate``, so results carry over.

Legend: R rows (sequences, or beams of them), T tokens so far, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import constraints
from .constraints import LogitsProcessor

_NEVER = float("-inf")


@dataclass
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        do_sample: Draw from the distribution; otherwise take its maximum.
        temperature: Divides the logits of a draw.
        top_k: Draw from this many most likely tokens; 0 for all.
        top_p: Draw from the smallest set of most likely tokens that holds this much probability.
        min_p: Draw from tokens at least this many times as likely as the most likely one.
        typical_p: Draw from tokens whose surprise is nearest to the expected one, up to this much probability (Meister
            et al. 2022).
        epsilon_cutoff, eta_cutoff: Leave out tokens less likely than epsilon, or than the lesser of eta and
            sqrt(eta) * exp(-entropy) (Hewitt et al. 2022).
        keep: Tokens that a draw leaves at least.
        processors: Functions (ids [R, T], scores [R, V]) -> scores, applied before the draw's.
        renormalize: Make log-probabilities of the processed scores.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    keep: int = 1
    processors: Sequence[LogitsProcessor] = field(default_factory=tuple)
    renormalize: bool = False

    def __post_init__(self) -> None:
        for name, wrong, need in (
            ("temperature", self.temperature <= 0, "a number above 0 (do_sample=False is the limit 0)"),
            ("top_k", self.top_k < 0, "0 for all tokens, or how many to draw from"),
            ("top_p", not 0 < self.top_p <= 1, "a probability above 0 and up to 1"),
            ("min_p", self.min_p is not None and not 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("typical_p", not 0 < self.typical_p <= 1, "a probability above 0 and up to 1"),
            ("epsilon_cutoff", not 0 <= self.epsilon_cutoff < 1, "a probability from 0 and below 1"),
            ("eta_cutoff", not 0 <= self.eta_cutoff < 1, "a probability from 0 and below 1"),
        ):
            if wrong:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {need}.")

    def process(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [R, V] after all penalties, bans and cuts, given the tokens so far ids [R, T]."""
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.do_sample:
            scores = self._warp(scores)
        return scores.log_softmax(-1) if self.renormalize else scores

    def choose(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """Next token int64 [R] from processed scores [R, V]."""
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    def _warp(self, scores: Tensor) -> Tensor:
        if self.temperature != 1.0:
            scores = scores / self.temperature
        if self.top_k:
            count = min(max(self.top_k, self.keep), scores.shape[-1])
            scores = scores.masked_fill(scores < scores.topk(count, dim=-1).values[:, -1:], _NEVER)
        if self.top_p < 1.0:
            ordered, order = scores.sort(dim=-1)
            drop = ordered.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[:, -self.keep :] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), _NEVER)
        if self.min_p is not None:
            likely = scores.softmax(-1)
            scores = self._cut(scores, likely, likely < self.min_p * likely.amax(-1, keepdim=True))
        if self.typical_p < 1.0:
            scores = self._typical(scores)
        if self.epsilon_cutoff:
            likely = scores.softmax(-1)
            scores = self._cut(scores, likely, likely < self.epsilon_cutoff)
        if self.eta_cutoff:
            likely = scores.softmax(-1)
            entropy = torch.distributions.Categorical(logits=scores).entropy()
            least = (math.sqrt(self.eta_cutoff) * (-entropy).exp()).clamp(max=self.eta_cutoff)
            scores = self._cut(scores, likely, likely < least[:, None])
        return scores

    def _cut(self, scores: Tensor, likely: Tensor, drop: Tensor) -> Tensor:
        """Leave out ``drop`` [R, V], but never the most likely ``keep`` tokens."""
        drop = drop.scatter(1, likely.topk(min(self.keep, likely.shape[-1]), dim=-1).indices, False)
        return scores.masked_fill(drop, _NEVER)

    def _typical(self, scores: Tensor) -> Tensor:
        log_likely = scores.log_softmax(-1)
        entropy = -(log_likely * log_likely.exp()).nansum(-1, keepdim=True)
        ordered, order = (-log_likely - entropy).abs().sort(dim=-1)
        held = scores.gather(1, order).softmax(-1).cumsum(-1)
        last = (held < self.typical_p).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        drop = ordered > ordered.gather(1, last)
        drop[:, : self.keep] = False
        return scores.masked_fill(drop.scatter(1, order, drop), _NEVER)


def sampling_options(
    options: Any,
    ends: Sequence[int],
    prompt: int,
    limit: int,
    prompt_ids: Tensor,
    padding: Tensor | None,
    further: Sequence[LogitsProcessor],
    allowed: Callable[[int, Tensor], Sequence[int]] | None,
) -> SamplingOptions:
    """How the tokens of one call of ``generate`` are chosen.

    Args:
        options: the settings of ``generation_config.DEFAULTS`` as attributes.
        ends: ids that end a sequence.
        prompt, limit: length at the start and at the end.
        prompt_ids: int64 [R, T].
        padding: int64 [R], tokens of padding at the start of each row.
        further: the caller's own functions, which come last.
        allowed: ``prefix_allowed_tokens_fn``.

    Raises:
        ValueError: an option is out of its range.
    """
    for name, wrong, need in (
        ("repetition_penalty", options.repetition_penalty <= 0, "a number above 0; 1 does nothing"),
        ("no_repeat_ngram_size", options.no_repeat_ngram_size < 0, "0 or the size of an n-gram"),
        (
            "bad_words_ids",
            any(len(word) == 0 for word in options.bad_words_ids or ()),
            "sequences of at least one id",
        ),
    ):
        if wrong:
            raise ValueError(f"{name} is {getattr(options, name)!r}; give {need}.")
    steps: list[LogitsProcessor] = []
    if options.sequence_bias is not None:
        steps.append(constraints.sequence_bias(options.sequence_bias))
    if options.encoder_repetition_penalty != 1.0:  # above 1 favours what the prompt holds
        steps.append(constraints.repetition(1.0 / options.encoder_repetition_penalty, prompt_ids))
    if options.repetition_penalty != 1.0:
        steps.append(constraints.repetition(options.repetition_penalty, ignored=padding))
    if options.no_repeat_ngram_size:
        steps.append(constraints.no_repeated_ngrams(options.no_repeat_ngram_size))
    if options.encoder_no_repeat_ngram_size:
        steps.append(constraints.no_repeated_ngrams(options.encoder_no_repeat_ngram_size, prompt_ids))
    words = [word for word in options.bad_words_ids or () if list(word) not in [[end] for end in ends]]
    if words:
        steps.append(constraints.sequence_bias([(word, float("-inf")) for word in words]))
    least = max(prompt + options.min_new_tokens, options.min_length)
    if ends and least > prompt:
        steps.append(constraints.until(least, constraints.ban(ends)))
    if allowed is not None:
        steps.append(constraints.allowed_by(allowed, options.num_beams))
    if options.forced_bos_token_id is not None:
        steps.append(constraints.at(1, constraints.force(options.forced_bos_token_id)))
    if options.forced_eos_token_id is not None:
        steps.append(constraints.at(limit - 1, constraints.force(options.forced_eos_token_id)))
    if options.remove_invalid_values:
        steps.append(constraints.without_invalid)
    if options.exponential_decay_length_penalty is not None:
        after, factor = options.exponential_decay_length_penalty
        steps.append(constraints.growing_end(prompt + int(after), float(factor), ends))
    if options.suppress_tokens:
        steps.append(constraints.ban(options.suppress_tokens))
    if options.begin_suppress_tokens:
        first = prompt if prompt > 1 or options.forced_bos_token_id is None else prompt + 1
        steps.append(constraints.at(first, constraints.ban(options.begin_suppress_tokens)))
    steps.extend(further)
    return SamplingOptions(
        options.do_sample,
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.typical_p,
        options.epsilon_cutoff,
        options.eta_cutoff,
        # Beams need one more than can end.
        max(2, len(ends) + 1) if options.num_beams > 1 else 1,
        steps,
        options.renormalize_logits,
    )
