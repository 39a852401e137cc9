"""Beam search over a decoder's steps.

Each prompt keeps ``num_beams`` running sequences and a pool of as many finished ones. A step ranks all
continuations of the running ones by summed log-probability and takes enough of them that ``num_beams`` are
left to run even if all the best ones end. A finished sequence scores its sum over length **
``length_penalty``; the search ends when no running one can enter the pool any more. Ties, bounds and the
ending are those of Transformers 5, whose results this reproduces token by token.

Legend: B prompts, n beams, V vocabulary, K length of all sequences, T prompt length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Decoder
from .sampling import SamplingOptions
from .stopping import Stopper
from .trace import Trace

_OUT = -1.0e9  # a score nothing real has


@dataclass
class BeamOptions:
    """``early_stopping``: True ends with the first full pool, False when the best running sequence is worse
    than
    the pool at its present length, ``"never"`` only when it would be at any length."""

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping={self.early_stopping!r} is not known; use True, False or 'never'."
            )
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is not between 1 and "
                f"num_beams={self.num_beams}."
            )


def _take(values: Tensor, order: Tensor) -> Tensor:
    """values [B, m, …] at order [B, k]."""
    return values.gather(
        1, order.view(*order.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])
    )


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    options: BeamOptions,
    sampling: SamplingOptions,
    stopper: Stopper,
    fill: int,
    generator: torch.Generator | None = None,
    trace: Trace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search from a decoder that has not read its prompt.

    Args:
        fill: id that stands behind shorter sequences.
        trace: takes the scores and logits of the steps.

    Returns:
        Sequences int64 [B * num_return_sequences, K], prompts included, their scores, and the row of the scores that
        each token came from, int32 [B * num_return_sequences, K - T], -1 behind the end.
    """
    beams, start = options.num_beams, decoder.ids.shape[1]
    limit = start + decoder.max_length - decoder.length
    batch, device = decoder.batch, decoder.ids.device
    width = max(2, 1 + len(stopper.eos)) * beams
    logits = decoder.prefill()
    decoder.expand(beams)
    logits = logits.repeat_interleave(beams, 0)

    running = torch.full((batch, beams, limit), fill, dtype=torch.long, device=device)
    running[:, :, :start] = decoder.ids[:, None]
    scores = torch.zeros(batch, beams, device=device)
    scores[:, 1:] = _OUT  # all beams of a prompt are equal at first: one of them is enough
    pool, pool_scores = running.clone(), torch.full((batch, beams), _OUT, device=device)
    pool_lengths = torch.zeros(batch, beams, dtype=torch.long, device=device)
    rows = torch.full((batch, beams, limit - start), -1, dtype=torch.int32, device=device)
    pool_rows = rows.clone()
    finished = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    offsets = torch.arange(batch, device=device)[:, None] * beams
    length = start

    while True:
        flat = running[:, :, :length].flatten(0, 1)
        ranked = sampling.process(flat, logits.float().log_softmax(-1))
        if trace is not None:
            trace.add(ranked, logits.float())
        vocabulary = ranked.shape[-1]
        ranked = (ranked.view(batch, beams, -1) + scores[:, :, None]).flatten(1)
        if sampling.do_sample:
            chosen = torch.multinomial(ranked.softmax(-1), width, generator=generator)
            values = ranked.gather(1, chosen)
        else:
            values, chosen = ranked.topk(width)
        parents = chosen // vocabulary
        candidates = _take(running, parents)
        candidates[:, :, length] = chosen % vocabulary
        candidate_rows = _take(rows, parents)
        candidate_rows[:, :, length - start] = (parents + offsets).int()
        length += 1
        stopped = stopper(candidates[:, :, :length].flatten(0, 1)).view(batch, width) | (length >= limit)

        going = values + stopped.float() * _OUT
        best = going.topk(beams)[1]
        running, scores, parents_kept = _take(candidates, best), _take(going, best), _take(parents, best)
        rows = _take(candidate_rows, best)

        just_finished = stopped.clone()
        just_finished[:, beams:] = False  # the rest are there only to keep enough sequences running
        generated = length - start
        final = values / generated**options.length_penalty
        full = finished.all(1, keepdim=True) & (options.early_stopping is True)
        final = final + (full | ~improvable).float() * _OUT + (~just_finished).float() * _OUT
        lengths = torch.full_like(parents, generated)
        best = torch.cat((pool_scores, final), 1).topk(beams)[1]
        pool = _take(torch.cat((pool, candidates), 1), best)
        pool_rows = _take(torch.cat((pool_rows, candidate_rows), 1), best)
        pool_scores = _take(torch.cat((pool_scores, final), 1), best)
        pool_lengths = _take(torch.cat((pool_lengths, lengths), 1), best)
        finished = _take(torch.cat((finished, just_finished), 1), best)

        longest = (
            limit - start if options.early_stopping == "never" and options.length_penalty > 0 else generated
        )
        reachable = scores[:, :1] / longest**options.length_penalty
        worst = torch.where(finished, pool_scores.min(1, keepdim=True)[0], _OUT)
        improvable = improvable & (reachable > worst).any(1, keepdim=True)
        done = bool(finished.all()) and options.early_stopping is True
        if done or not bool(improvable.any()) or bool(stopped.all()):
            break
        decoder.reorder((parents_kept + offsets).flatten())
        logits = decoder.step(running[:, :, :length].flatten(0, 1), generated)

    keep = options.num_return_sequences
    end = start + int(pool_lengths[:, :keep].max())
    return (
        pool[:, :keep, :end].flatten(0, 1),
        pool_scores[:, :keep].flatten(),
        pool_rows[:, :keep, : end - start].flatten(0, 1),
    )
