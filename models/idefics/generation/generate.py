"""``generate``: prompts of text and images continued token by token.

Legend: B prompts, T tokens of the prompt, N images a row, K tokens in the end, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace as Settings
from typing import Any, cast

import torch
from torch import Tensor

from ...inputs import tensor_of
from ...outputs import ModelOutput
from ..cache import IdeficsCache
from ..validation import check_text
from .beam_search import BeamOptions, beam_search
from .constraints import LogitsProcessor
from .decoder import Decoder
from .generation_config import DEFAULTS, NEUTRAL, WITHOUT_EFFECT, GenerationConfig
from .protocol import GeneratingModel
from .sampling import SamplingOptions, sampling_options
from .stopping import Criterion, Stopper, Streamer
from .trace import Trace

_DEFAULT_NEW_TOKENS = 20
# What other processors make and no model here reads, and what is done anyway.
_WITHOUT_EFFECT = WITHOUT_EFFECT | {"token_type_ids", "logits_to_keep", "use_model_defaults"}


@dataclass
class GenerateOutput(ModelOutput):
    """What ``generate(return_dict_in_generate=True)`` returns.

    Attributes:
        sequences: int64 [B * num_return_sequences, K], prompts included (unless they came as embeddings).
        scores: Processed scores [R, V] of every step, if ``output_scores``; of beams, log-probabilities.
        logits: Logits [R, V] of every step, if ``output_logits``.
        attentions, hidden_states: What ``forward`` returns of them, of every step.
        past_key_values: The cache, which a further call can go on from; not of beams.
        sequences_scores: Final scores of the returned beams.
        beam_indices: int32 [B * num_return_sequences, K - T], the row of ``scores`` that each token came from, -1
            behind the end; of beams, if ``output_scores``.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: IdeficsCache | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None


class GenerationMixin:
    """Gives a model ``generate``."""

    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        generation_config: Any = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[Criterion] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        tokenizer: Any = None,
        streamer: Streamer | None = None,
        compile: bool | dict[str, Any] = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput:
        """Continue prompts; options not described here mean what they do in Transformers.

        Args:
            input_ids: int [B, T] (``inputs`` is its other name); prompts of unlike length are padded, on either
                side, and ``attention_mask`` [B, T] says where. Without a mask, tokens equal to ``pad_token_id`` are
                padding. Left out altogether, the beginning-of-sequence token.
            inputs_embeds: [B, T, C] instead; the result then holds the new tokens alone.
            pixel_values: [B, N, 3, height, width], or embeddings, with ``image_attention_mask`` [B, T, N];
                new tokens see what the last token of their prompt sees.
            position_ids: int [B, T] of the prompt, on from which the rest is counted; by default those that the mask
                makes.
            past_key_values: Cache of a part of the prompt at its beginning, as an earlier call returned it.
            generation_config: Options by name; those given by keyword go before these, and these before
                ``self.generation_config``, a checkpoint's.
            logits_processor: Functions (ids, scores) -> scores, after the other constraints and before a draw's cuts.
            stopping_criteria: Functions (ids, scores or None) -> bool [R], or one bool, true where a row is done.
            prefix_allowed_tokens_fn: (prompt number, ids [T]) -> ids that may come next.
            tokenizer: Reads what has been generated, for ``stop_strings``.
            streamer: Told of the prompt and of every token; not with beams.
            compile: With ``cache_implementation="static"``, which keeps all shapes fixed, make one graph of a step;
                True, or arguments of ``torch.compile``.
            generator: Source of the draws.
            options: Settings of `GenerationConfig`: ``max_new_tokens`` (20 by default; ``max_length`` counts the prompt
                too), ``do_sample``, ``num_beams`` and so on.

        Returns:
            Prompts and continuations int64 [B * num_return_sequences, K], filled up with ``pad_token_id``; or a
            `GenerateOutput`, with ``return_dict_in_generate``.

        Raises:
            ValueError: Inputs do not fit each other or the model, an option is not known, or options contradict each
                other.
        """
        model = cast(GeneratingModel, self)
        given = {
            "pixel_values": pixel_values,
            "image_encoder_embeddings": image_encoder_embeddings,
            "perceiver_embeddings": perceiver_embeddings,
            "image_attention_mask": image_attention_mask,
        }
        images = {name: tensor_of(model, value) for name, value in given.items() if value is not None}
        if pixel_values is not None:
            images["interpolate_pos_encoding"] = interpolate_pos_encoding
        config = _options(model, generation_config, options)
        ends, pad = _special(model, config)
        input_ids = tensor_of(model, inputs if input_ids is None else input_ids)
        inputs_embeds, attention_mask = tensor_of(model, inputs_embeds), tensor_of(model, attention_mask)
        if input_ids is None and inputs_embeds is None and attention_mask is not None:
            raise ValueError(
                "generate needs input_ids [B, T] (or inputs_embeds) where attention_mask is given."
            )
        ids, prompt = _prompt(model, config, input_ids, inputs_embeds, images)
        seen = images.get("image_attention_mask")
        if isinstance(seen, Tensor) and seen.dim() == 3 and 0 < seen.shape[1] < prompt:
            # A continued text: what follows sees what the last token did.
            images["image_attention_mask"] = torch.cat(
                (seen, seen[:, -1:].expand(-1, prompt - seen.shape[1], -1)), 1
            )
        if attention_mask is not None and attention_mask.shape != (len(ids), prompt):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; give {[len(ids), prompt]} like the prompt."
            )
        position_ids = tensor_of(model, position_ids)
        if position_ids is not None and position_ids.shape not in ((len(ids), prompt), (1, prompt)):
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; give {[len(ids), prompt]} like the prompt."
            )
        if attention_mask is None and inputs_embeds is None and pad is not None and pad not in ends:
            attention_mask = ids != pad
        if pad is None:
            pad = ends[0] if ends else 0
        limit = _limit(prompt, config.max_new_tokens, config.max_length)
        _check(config, compile, streamer)
        stops = (
            [config.stop_strings] if isinstance(config.stop_strings, str) else list(config.stop_strings or ())
        )
        stopper = Stopper(
            ends, stops, tokenizer, ids.shape[1], criteria=stopping_criteria or (), max_time=config.max_time
        )
        wants_dict = config.return_dict_in_generate
        was_training = model.training
        model.eval()
        try:
            decoder = Decoder(
                model,
                ids,
                attention_mask,
                images,
                limit,
                use_cache=config.use_cache,
                static=config.cache_implementation == "static",
                compiled=(compile if isinstance(compile, dict) else {}) if compile else None,
                embeds=inputs_embeds,
                position_ids=None if position_ids is None else position_ids.expand(len(ids), -1),
                past=past_key_values,
                # What is returned must go on with any images, not with those the last token looks at alone.
                keep_all=wants_dict and config.num_beams == 1,
                want_states=wants_dict and config.output_hidden_states,
                want_weights=wants_dict and config.output_attentions,
            )
            copies = config.num_beams if config.num_beams > 1 else config.num_return_sequences
            padding = None if attention_mask is None else (attention_mask != 0).int().argmax(1)
            sampling = sampling_options(
                config,
                ends,
                ids.shape[1],
                limit - prompt + ids.shape[1],
                ids.repeat_interleave(copies, 0),
                None if padding is None or inputs_embeds is not None else padding.repeat_interleave(copies),
                logits_processor or (),
                prefix_allowed_tokens_fn,
            )
            trace = Trace(wants_dict and config.output_scores, wants_dict and config.output_logits)
            if config.num_beams > 1:
                beams = BeamOptions(
                    config.num_beams,
                    config.length_penalty,
                    config.early_stopping,
                    config.num_return_sequences,
                )
                # Transformers takes an id of 0 for none here and fills up with the end token.
                fill = pad or (ends[0] if ends else pad)
                sequences, final, indices = beam_search(
                    decoder, beams, sampling, stopper, fill, generator, trace
                )
                result = GenerateOutput(
                    sequences, sequences_scores=final, beam_indices=indices if trace.keep_scores else None
                )
            else:
                result = GenerateOutput(
                    _one_by_one(
                        decoder,
                        sampling,
                        stopper,
                        pad,
                        config.num_return_sequences,
                        streamer,
                        generator,
                        trace,
                    ),
                    past_key_values=decoder.cache,
                )
        finally:
            model.train(was_training)
        assert result.sequences is not None
        if not wants_dict:
            return result.sequences
        result.scores, result.logits = trace.collected()
        result.attentions = tuple(decoder.attentions) if decoder.want_weights else None
        result.hidden_states = tuple(decoder.states) if decoder.want_states else None
        return result

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: Sequence[Tensor],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """Score of each generated token: float [R, K - T], from what ``generate`` returned with ``output_scores``.

        Args:
            sequences: int64 [R, K].
            scores: [R', V] of every step.
            beam_indices: int [R, K - T] of beams.
            normalize_logits: make log-probabilities of the scores first.
        """
        stacked = torch.stack(
            [s.log_softmax(-1) if normalize_logits else s for s in scores]
        )  # [steps, R', V]
        if beam_indices is None:
            rows = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(scores))
        else:
            rows = beam_indices[:, : len(scores)].long()
        steps = rows.shape[1]
        tokens = sequences[:, sequences.shape[1] - steps :]
        picked = stacked[torch.arange(steps, device=rows.device), rows.clamp(min=0), tokens]
        return picked.masked_fill(rows < 0, 0.0)


def _options(model: GeneratingModel, given: Any, options: Mapping[str, Any]) -> Settings:
    """The options of a call: by keyword, of ``generation_config``, of the checkpoint, the defaults, in this order."""
    named = {k: v for k, v in options.items() if v is not None and k not in _WITHOUT_EFFECT}
    if unknown := sorted(named.keys() - DEFAULTS.keys() - NEUTRAL.keys()):
        raise ValueError(f"generate was given {', '.join(unknown)}, which it does not know; check the name.")
    told = GenerationConfig(**named).over(GenerationConfig.wrap(given))
    return Settings(**told.over(model.generation_config).resolved())


def _special(model: GeneratingModel, config: Settings) -> tuple[list[int], int | None]:
    """Ids that end a sequence, and the one that fills up behind them."""
    ends = model.config.eos_token_ids if config.eos_token_id is None else config.eos_token_id
    ends = (
        ends.flatten().tolist()
        if isinstance(ends, Tensor)
        else [ends]
        if isinstance(ends, int)
        else list(ends)
    )
    pad = model.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
    return [int(end) for end in ends], None if pad is None else int(pad)


def _prompt(
    model: GeneratingModel,
    config: Settings,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    images: Mapping[str, Any],
) -> tuple[Tensor, int]:
    """Ids the result begins with [B, T] (of embeddings, [B, 0]), and the prompt's length T."""
    if inputs_embeds is not None:
        batch, prompt = check_text(model.config, None, inputs_embeds)
        if input_ids is None:
            return torch.empty(batch, 0, dtype=torch.long, device=inputs_embeds.device), prompt
        if input_ids.shape != (batch, prompt):
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} came with inputs_embeds of {[batch, prompt]} tokens; give either, "
                "or both of one prompt."
            )
        return input_ids, prompt
    if input_ids is None:
        begin = model.config.bos_token_id if config.bos_token_id is None else config.bos_token_id
        if begin is None:
            raise ValueError(
                "generate needs input_ids [B, T]; give at least the beginning-of-sequence token."
            )
        batch = next((len(value) for value in images.values() if isinstance(value, Tensor)), 1)
        input_ids = torch.full((batch, 1), int(begin), dtype=torch.long, device=model.device)
    return input_ids, check_text(model.config, input_ids, None)[1]


def _check(config: Settings, compile: Any, streamer: Any) -> None:
    """
    Raises:
        ValueError: options contradict each other.
    """
    if config.cache_implementation not in ("dynamic", "static"):
        raise ValueError(
            f"cache_implementation={config.cache_implementation!r} is not known; use 'dynamic' or 'static'."
        )
    if compile and not (config.cache_implementation == "static" and config.use_cache):
        raise ValueError("compile needs cache_implementation='static', whose shapes never change.")
    if config.num_beams < 1 or config.num_return_sequences < 1:
        raise ValueError(
            f"num_beams={config.num_beams} and num_return_sequences={config.num_return_sequences} must be at least 1."
        )
    if config.num_beams > 1 and streamer is not None:
        raise ValueError("streamer does not work with num_beams above 1; a beam may still be dropped.")
    if config.num_beams == 1 and config.num_return_sequences > 1 and not config.do_sample:
        raise ValueError(
            "num_return_sequences above 1 needs do_sample=True or num_beams: greedy search has one result."
        )


def _one_by_one(
    decoder: Decoder,
    sampling: SamplingOptions,
    stopper: Stopper,
    pad: int,
    copies: int,
    streamer: Streamer | None,
    generator: torch.Generator | None,
    trace: Trace,
) -> Tensor:
    """Greedy search or sampling: int64 [B * copies, K]."""
    start = decoder.ids.shape[1]
    if streamer is not None and start:
        streamer.put(decoder.ids.cpu())
    logits = decoder.prefill()
    if copies > 1:
        decoder.expand(copies)
        logits = logits.repeat_interleave(copies, 0)
    limit = start + decoder.max_length - decoder.length
    ids = decoder.ids.new_full((decoder.batch * copies, limit), pad)
    ids[:, :start] = decoder.ids.repeat_interleave(copies, 0)
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    length = start
    while True:
        scores = sampling.process(ids[:, :length], logits.float())
        trace.add(scores, logits.float())
        token = torch.where(running, sampling.choose(scores, generator), pad)
        ids[:, length] = token
        length += 1
        if streamer is not None:
            streamer.put(token.cpu())
        running = running & ~stopper(ids[:, :length], trace.scores if trace.keep_scores else None)
        if length >= limit or not bool(running.any()):
            break
        logits = decoder.step(ids[:, :length], length - start)
    if streamer is not None:
        streamer.end()
    return ids[:, :length]


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
