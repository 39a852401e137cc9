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
from .generation_config import DEFAULTS, GenerationConfig
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
        generation_config: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        min_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: Sequence[LogitsProcessor] = (),
        num_beams: int | None = None,
        num_return_sequences: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        streamer: Streamer | None = None,
        use_cache: bool | None = None,
        cache_implementation: str | None = None,
        compile: bool | dict[str, Any] = False,
        generator: torch.Generator | None = None,
        return_dict_in_generate: bool | None = None,
        output_scores: bool | None = None,
    ) -> Tensor | GenerateOutput:
        """Continue prompts; options not described here mean what they do in Transformers.

        Options that are None are those of ``generation_config``, then of the model's own ``generation_config``
        (its ``generation_config.json``), then the defaults: greedy search for 20 tokens.

        Args:
            input_ids: int [B, T]; prompts of unlike length are padded, on either side, and ``attention_mask``
                [B, T] says where.
            pixel_values: [B, N, 3, height, width], or embeddings, with ``image_attention_mask`` [B, T, N];
                new tokens see what the last token of their prompt sees.
            generation_config: A ``GenerationConfig``, one of Transformers, or a dictionary.
            max_new_tokens: At most this many new tokens. ``max_length`` counts the prompt too.
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
        named = locals()
        given = {name: named[name] for name in DEFAULTS if named[name] is not None}
        told = GenerationConfig(**given).over(GenerationConfig.wrap(generation_config))
        settings = told.over(model.generation_config).resolved()
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
        limit = _limit(prompt, settings["max_new_tokens"], settings["max_length"])
        ends = model.config.eos_token_ids
        if (asked := settings["eos_token_id"]) is not None:
            ends = [asked] if isinstance(asked, int) else list(asked)
        pad = model.config.pad_token_id if settings["pad_token_id"] is None else settings["pad_token_id"]
        if pad is None:
            pad = ends[0] if ends else 0
        if (cache := settings["cache_implementation"]) not in ("dynamic", "static"):
            raise ValueError(f"cache_implementation={cache!r} is not known; use 'dynamic' or 'static'.")
        static = cache == "static"
        if compile and not (static and settings["use_cache"]):
            raise ValueError("compile needs cache_implementation='static', whose shapes never change.")
        beams, copies = settings["num_beams"], settings["num_return_sequences"]
        if beams < 1 or copies < 1:
            raise ValueError(f"num_beams={beams} and num_return_sequences={copies} must be at least 1.")
        sampling = SamplingOptions(
            settings["do_sample"],
            settings["temperature"],
            settings["top_k"],
            settings["top_p"],
            settings["repetition_penalty"],
            settings["no_repeat_ngram_size"],
            # What ends a text may always be written, as in Transformers.
            [word for word in settings["bad_words_ids"] or () if list(word) not in [[end] for end in ends]],
            logits_processor,
        )
        texts = settings["stop_strings"] or ()
        stops = [texts] if isinstance(texts, str) else list(texts)
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
                use_cache=settings["use_cache"],
                static=static,
                compiled=(compile if isinstance(compile, dict) else {}) if compile else None,
            )
            banned_until = max(prompt + settings["min_new_tokens"], settings["min_length"])
            if beams > 1:
                if streamer is not None:
                    raise ValueError(
                        "streamer does not work with num_beams above 1; a beam may still be dropped."
                    )
                options = BeamOptions(beams, settings["length_penalty"], settings["early_stopping"], copies)
                # Transformers takes an id of 0 for none here and fills up with the end token.
                fill = pad or (ends[0] if ends else pad)
                sequences, final = beam_search(
                    decoder, options, sampling, stopper, fill, banned_until, generator
                )
                result = GenerateOutput(sequences, None, final)
            else:
                if copies > 1 and not settings["do_sample"]:
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
                    copies,
                    streamer,
                    generator,
                    settings["output_scores"],
                )
        finally:
            model.train(was_training)
        assert result.sequences is not None
        return result if settings["return_dict_in_generate"] else result.sequences


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
