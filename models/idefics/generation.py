"""``generate``: prompts of text and images continued token by token.

Legend: B prompts, T tokens of the prompt, N images a row, K tokens in the end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..outputs import ModelOutput
from .beam_search import BeamOptions, beam_search
from .decoding import Decoder
from .sampling import LogitsProcessor, SamplingOptions
from .stopping import Stopper, Streamer
from .validation import check_text

if TYPE_CHECKING:
    from .causal_lm import IdeficsForVisionText2Text

_DEFAULT_NEW_TOKENS = 20


@dataclass
class GenerateOutput(ModelOutput):
    """What ``generate(return_dict_in_generate=True)`` returns.

    Attributes:
        sequences: int64 [B * num_return_sequences, K], prompts included.
        scores: Processed logits [B, V] of every step, if ``output_scores`` (not of beams).
        sequences_scores: Final scores of the returned beams.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None


class GenerationMixin:
    """Gives a model ``generate``."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int = 0,
        min_length: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        num_beams: int = 1,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Streamer | None = None,
        use_cache: bool = True,
        cache_implementation: str = "dynamic",
        compile: bool | dict[str, Any] = False,
        generator: torch.Generator | None = None,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
    ) -> Tensor | GenerateOutput:
        """Continue prompts; options not described here mean what they do in Transformers.

        Args:
            input_ids: int [B, T]; prompts of unlike length are padded, on either side, and ``attention_mask``
                [B, T] says where.
            pixel_values: [B, N, 3, height, width], or embeddings, with ``image_attention_mask`` [B, T, N];
                new tokens see what the last token of their prompt sees.
            max_new_tokens: At most this many new tokens; 20 by default. ``max_length`` counts the prompt too.
            do_sample: Draw, by ``temperature``, ``top_k`` and ``top_p``; else take the most likely token.
            num_beams: Beam search, if above 1.
            stop_strings: End a sequence when its continuation holds one of these; needs ``tokenizer``.
            streamer: Told of the prompt and of every token; not with beams.
            use_cache: Without, everything is computed again at every step.
            cache_implementation: ``"static"`` keeps all shapes fixed, so that ``compile`` (True, or
                arguments of ``torch.compile``) makes one graph of a step.
            generator: Source of the draws.

        Returns:
            Prompts and continuations int64 [B * num_return_sequences, K], filled up with ``pad_token_id``.

        Raises:
            ValueError: Inputs do not fit each other or the model, or options contradict each other.
        """
        model = cast("IdeficsForVisionText2Text", self)
        if input_ids is None:
            raise ValueError(
                "generate needs input_ids [B, T]; give at least the beginning-of-sequence token."
            )
        _, prompt = check_text(model.config, input_ids, None)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; give {list(input_ids.shape)} like "
                "input_ids."
            )
        limit = _limit(prompt, max_new_tokens, max_length)
        ends = model.config.eos_token_ids
        if eos_token_id is not None:
            ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        pad = pad_token_id if pad_token_id is not None else model.config.pad_token_id
        if pad is None:
            pad = ends[0] if ends else 0
        if cache_implementation not in ("dynamic", "static"):
            raise ValueError(
                f"cache_implementation={cache_implementation!r} is not known; use 'dynamic' or 'static'."
            )
        static = cache_implementation == "static"
        if compile and not (static and use_cache):
            raise ValueError("compile needs cache_implementation='static', whose shapes never change.")
        if num_beams < 1 or num_return_sequences < 1:
            raise ValueError(
                f"num_beams={num_beams} and num_return_sequences={num_return_sequences} must be at least 1."
            )
        sampling = SamplingOptions(
            do_sample,
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            no_repeat_ngram_size,
            bad_words_ids or (),
            logits_processor,
        )
        stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        stopper = Stopper(ends, stops, tokenizer, prompt)
        given: dict[str, Any] = {
            "pixel_values": pixel_values,
            "image_encoder_embeddings": image_encoder_embeddings,
            "perceiver_embeddings": perceiver_embeddings,
            "image_attention_mask": image_attention_mask,
        }
        images = {name: value for name, value in given.items() if value is not None}
        if pixel_values is not None:
            images["interpolate_pos_encoding"] = interpolate_pos_encoding
        was_training = model.training
        model.eval()
        try:
            decoder = Decoder(
                model,
                input_ids,
                attention_mask,
                images,
                limit,
                use_cache=use_cache,
                static=static,
                compiled=(compile if isinstance(compile, dict) else {}) if compile else None,
            )
            banned_until = max(prompt + min_new_tokens, min_length)
            if num_beams > 1:
                if streamer is not None:
                    raise ValueError(
                        "streamer does not work with num_beams above 1; a beam may still be dropped."
                    )
                options = BeamOptions(num_beams, length_penalty, early_stopping, num_return_sequences)
                # Transformers takes an id of 0 for none here and fills up with the end token.
                fill = pad or (ends[0] if ends else pad)
                sequences, final = beam_search(
                    decoder, options, sampling, stopper, fill, banned_until, generator
                )
                result = GenerateOutput(sequences, None, final)
            else:
                if num_return_sequences > 1 and not do_sample:
                    raise ValueError(
                        "num_return_sequences above 1 needs do_sample=True or num_beams: greedy search has "
                        "one result."
                    )
                result = _one_by_one(
                    decoder,
                    sampling,
                    stopper,
                    pad,
                    banned_until,
                    num_return_sequences,
                    streamer,
                    generator,
                    output_scores,
                )
        finally:
            model.train(was_training)
        assert result.sequences is not None
        return result if return_dict_in_generate else result.sequences


def _one_by_one(
    decoder: Decoder,
    sampling: SamplingOptions,
    stopper: Stopper,
    pad: int,
    banned_until: int,
    copies: int,
    streamer: Streamer | None,
    generator: torch.Generator | None,
    keep_scores: bool,
) -> GenerateOutput:
    """Greedy search or sampling."""
    if streamer is not None:
        streamer.put(decoder.ids.cpu())
    logits = decoder.prefill()
    if copies > 1:
        decoder.expand(copies)
        logits = logits.repeat_interleave(copies, 0)
    start, limit = decoder.length, decoder.max_length
    ids = decoder.ids.new_full((decoder.batch * copies, limit), pad)
    ids[:, :start] = decoder.ids.repeat_interleave(copies, 0)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    ends = stopper.eos.tolist()
    length, kept = start, []
    while True:
        scores = sampling.process(ids[:, :length], logits.float(), ends if length < banned_until else ())
        if keep_scores:
            kept.append(scores)
        token = torch.where(running, sampling.choose(scores, generator), pad)
        ids[:, length] = token
        length += 1
        if streamer is not None:
            streamer.put(token.cpu())
        running = running & ~stopper(ids[:, :length])
        if length >= limit or not bool(running.any()):
            break
        logits = decoder.step(ids[:, :length], length - start)
    if streamer is not None:
        streamer.end()
    return GenerateOutput(ids[:, :length], tuple(kept) if keep_scores else None)


def _limit(prompt: int, max_new_tokens: int | None, max_length: int | None) -> int:
    """Length at which every sequence ends."""
    if max_new_tokens is None and max_length is not None:
        if max_length <= prompt:
            raise ValueError(
                f"max_length={max_length} leaves no room after a prompt of {prompt} tokens; raise it or give "
                "max_new_tokens."
            )
        return max_length
    new = _DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if new < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; give at least 1.")
    return prompt + new
