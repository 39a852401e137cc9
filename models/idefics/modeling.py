"""The IDEFICS decoder: a LLaMA with a gated cross-attention block before every few of its layers.

Legend: B batch, T new tokens, K tokens so far, N images a row, S tokens of an encoded image, L keys an image
(latents of the resampler, or S), C hidden size, E image width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from ..outputs import ModelOutput
from .attention import AttentionLayout, IdeficsAttention, Segments
from .cache import IdeficsCache, ImageCache, ImageFocus
from .configuration import IdeficsConfig
from .cross_attention import IdeficsGatedCrossAttentionLayer
from .embedding import IdeficsDecoupledEmbedding
from .images import ImageContext, cut_at_documents, flat_lists, image_slots
from .layers import IdeficsMLP, IdeficsRMSNorm, dropout, rotary_tables
from .perceiver import IdeficsPerceiverResampler
from .pretrained import IdeficsPreTrainedModel
from .validation import (
    check_cache,
    check_documents,
    check_image_inputs,
    check_image_mask,
    check_text,
    check_text_mask,
)
from .vision import IdeficsVisionTransformer

# Images that pass through a frozen encoder at a time: enough to keep the device busy, and no activations of
# more.
_FROZEN_IMAGES = {"cpu": 4}
_FROZEN_IMAGES_GPU = 64


@dataclass
class IdeficsBaseModelOutputWithPast(ModelOutput):
    """What ``IdeficsModel`` returns.

    Attributes:
        last_hidden_state: [B, T, C] after the final norm.
        past_key_values: The cache, where one was asked for.
        hidden_states: [B, T, C] each: the input of the first decoder layer (after the gated block before it),
            the outputs of all but the last, and ``last_hidden_state``.
        attentions: Self-attention probabilities [B, H, T, K] of every decoder layer.
        image_hidden_states: [B, N, L, E], what the gated blocks read; zeros for images that were left out.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: IdeficsCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class IdeficsDecoderLayer(nn.Module):
    """One LLaMA layer, x [B, T, C] -> ([B, T, C], probabilities or None)."""

    def __init__(self, config: IdeficsConfig, index: int) -> None:
        super().__init__()
        self.self_attn = IdeficsAttention(config, index)
        self.mlp = IdeficsMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout, self.site = config.dropout, f"text.{index}"

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: AttentionLayout,
        cache: Any = None,
        noise: Noise | None = None,
        want_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        update, weights = self.self_attn(self.input_layernorm(x), rotary, layout, cache, noise, want_weights)
        x = x + dropout(update, self.dropout, self.training, noise, self.site + ".residual")
        update = self.mlp(self.post_attention_layernorm(x))
        return x + dropout(update, self.dropout, self.training, noise, self.site + ".mlp"), weights


class IdeficsModel(IdeficsPreTrainedModel):
    """The decoder without its head; it loads from checkpoints of the whole model too."""

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.embed_tokens = IdeficsDecoupledEmbedding(
            config.vocab_size, config.additional_vocab_size, config.hidden_size, config.freeze_text_layers
        )
        self.vision_model = IdeficsVisionTransformer(config.vision_config)
        if config.use_resampler:
            self.perceiver_resampler = IdeficsPerceiverResampler(config)
        self.layers = nn.ModuleList(IdeficsDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        blocks = config.num_hidden_layers // config.cross_layer_interval
        self.gated_cross_attn_layers = nn.ModuleList(
            IdeficsGatedCrossAttentionLayer(config, i) for i in range(blocks)
        )
        self.norm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.reset_parameters()
        self.freeze_relevant_params()

    def reset_parameters(self) -> None:
        """Draw new weights: ``initializer_range`` for the text model, IDEFICS's own scheme for what is added
        to it.

        The gated blocks start with variance 0.4 / fan-in, their last projections divided by sqrt(2 * layers).
        """
        if self.embed_tokens.weight.is_meta:
            return
        deviation = self.config.initializer_range
        for module in (self.embed_tokens, self.layers, self.norm):
            for part in module.modules():
                if isinstance(part, (nn.Linear, nn.Embedding, IdeficsDecoupledEmbedding)):
                    nn.init.normal_(part.weight, std=deviation)
                elif isinstance(part, IdeficsRMSNorm):
                    nn.init.ones_(part.weight)
        for name, part in self.gated_cross_attn_layers.named_modules():
            if isinstance(part, nn.Linear):
                deviation = math.sqrt(0.4 / part.in_features)
                if name.endswith(("down_proj", "o_proj")):
                    deviation /= math.sqrt(2 * self.config.num_hidden_layers)
                nn.init.normal_(part.weight, std=deviation)
            elif isinstance(part, IdeficsRMSNorm):
                nn.init.ones_(part.weight)
            elif isinstance(part, IdeficsGatedCrossAttentionLayer):
                part.reset_alphas()
        self.vision_model.reset_parameters()
        if self.config.use_resampler:
            self.perceiver_resampler.reset_parameters()

    def freeze_relevant_params(self, config: IdeficsConfig | None = None) -> None:
        """Freeze what the configuration's ``freeze_…`` fields name."""
        config = config or self.config
        if config.freeze_text_layers:
            self.freeze_text_layers(config.freeze_text_module_exceptions)
        if config.freeze_vision_layers:
            self.freeze_vision_layers(config.freeze_vision_module_exceptions)

    def freeze_text_layers(self, module_exceptions: Iterable[str] = ()) -> None:
        """Freeze base embeddings, decoder layers and final norm, but for layers of the named kinds."""
        exceptions = list(module_exceptions)
        self.embed_tokens.weight.requires_grad_("Embedding" in exceptions)
        for module in (self.layers, self.norm):
            _freeze(module, exceptions)

    def freeze_vision_layers(self, module_exceptions: Iterable[str] = ()) -> None:
        """Freeze the image encoder, but for layers of the named kinds."""
        _freeze(self.vision_model, list(module_exceptions))

    def get_input_embeddings(self) -> IdeficsDecoupledEmbedding:
        return self.embed_tokens

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.startswith("lm_head."):
            return None
        return super().rename(name.removeprefix("model."))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: IdeficsCache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_encoder_embeddings: Tensor | None = None,
        perceiver_embeddings: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        *,
        document_ids: Tensor | None = None,
        noise: Noise | None = None,
        skip_unseen_images: bool | None = None,
    ) -> IdeficsBaseModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder.

        Args:
            input_ids: int [B, T]; or ``inputs_embeds`` [B, T, C].
            attention_mask: [B, K] over cached and new tokens, zero on padding.
            position_ids: int [B, T]; counted from the attention mask, or within documents, by default.
            past_key_values: The cache of the tokens before these; it is extended in place. Its images stay
                those of the call that brought them: images given again with it are not encoded again.
            pixel_values: [B, N, 3, height, width]; or ``image_encoder_embeddings`` [B, N, S, E] of the image
                encoder; or ``perceiver_embeddings`` [B, N, L, E] of the resampler. Leave all three out for
                text.
            image_attention_mask: [B, T, N], nonzero where a token sees an image. With a cache it may be left
                out: new tokens then see what the last one saw.
            use_cache: Return a cache; by default as the configuration says, but never in training.
            output_hidden_states, output_attentions, return_dict: As the configuration says by default.
            interpolate_pos_encoding: Accept images of another size than the model was built for.
            document_ids: int [B, T], -1 for padding: several documents stand in a row, and neither attention
                nor images cross from one to another.
            noise: Source of dropout's randomness in training; torch's default generator without it.
            skip_unseen_images: Leave out images that no token sees (their states come back as zeros); by
                default only with ``document_ids``.

        Raises:
            ValueError: Shapes, counts or ids do not fit each other or the model.
        """
        config = self.config
        want_weights = config.output_attentions if output_attentions is None else output_attentions
        want_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        batch, tokens = check_text(config, input_ids, inputs_embeds)
        if use_cache is None:
            use_cache = config.use_cache and not self.training and document_ids is None
        cache = past_key_values
        past = check_cache(cache, config, batch)
        check_documents(document_ids, batch, tokens, cache, attention_mask)
        if cache is None and use_cache:
            cache = IdeficsCache(config.num_hidden_layers)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout, position_ids = self._layout(
            x, attention_mask, position_ids, document_ids, cache, past, want_weights
        )
        if noise is not None and not self.training:
            noise = None
        images, image_states = self._images(
            batch,
            tokens,
            x,
            pixel_values,
            image_encoder_embeddings,
            perceiver_embeddings,
            image_attention_mask,
            cache,
            document_ids,
            interpolate_pos_encoding,
            document_ids is not None if skip_unseen_images is None else skip_unseen_images,
            noise,
        )
        if cache is not None:
            cache.batch_size = batch
        x, states, attentions = self.decode(
            x, position_ids, layout, images, cache, noise, want_states, want_weights
        )
        if cache is not None and cache.static:
            cache.position.add_(tokens)  # pyright: ignore[reportAttributeAccessIssue]
        output = IdeficsBaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=states,
            attentions=attentions,
            image_hidden_states=image_states,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def decode(
        self,
        x: Tensor,
        position_ids: Tensor,
        layout: AttentionLayout,
        images: ImageContext | None,
        cache: IdeficsCache | None,
        noise: Noise | None = None,
        want_states: bool = False,
        want_weights: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Embedded tokens [B, T, C] through all layers and the final norm, the inputs being known to fit."""
        config = self.config
        rotary = rotary_tables(position_ids, config.head_dim, config.rope_theta, x.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states, attentions = [], []
        for index, layer in enumerate(self.layers):
            if index % config.cross_layer_interval == 0:
                block = self.gated_cross_attn_layers[index // config.cross_layer_interval]
                if recompute:
                    x = checkpoint(block, x, images, noise, use_reentrant=False)  # pyright: ignore
                else:
                    x = block(x, images, noise)
            if want_states and index == 0:
                states.append(x)
            memory = cache.layers[index] if cache is not None else None
            if recompute:
                x, weights = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
                    layer, x, rotary, layout, memory, noise, want_weights, use_reentrant=False
                )
            else:
                x, weights = layer(x, rotary, layout, memory, noise, want_weights)
            attentions.append(weights)
            if want_states and index + 1 < len(self.layers):
                states.append(x)
        x = self.norm(x)
        if want_states:
            states.append(x)
        return x, tuple(states) if want_states else None, tuple(attentions) if want_weights else None

    def _layout(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        cache: IdeficsCache | None,
        past: int,
        want_weights: bool,
    ) -> tuple[AttentionLayout, Tensor]:
        """Decide how tokens attend to each other, and their positions."""
        batch, tokens = x.shape[:2]
        if document_ids is not None:
            segments = Segments.from_document_ids(document_ids)
            if position_ids is None:
                position_ids = segments.positions(x.device).view(batch, tokens)
            if want_weights or (self.training and self.config.dropout > 0):
                return AttentionLayout(segments.mask(batch, x.device), False), position_ids
            return AttentionLayout(None, False, segments), position_ids
        if cache is not None and cache.static:
            return self._static_layout(x, attention_mask, position_ids, cache)
        real = check_text_mask(attention_mask, batch, past + tokens, tokens, cache)
        if position_ids is None:
            if real is None:
                position_ids = torch.arange(past, past + tokens, device=x.device)[None]
            else:
                position_ids = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)[:, past:]
        if cache is not None:
            cache.key_mask = real
        if real is None and (past == 0 or tokens == 1):
            return AttentionLayout(None, past == 0 and tokens > 1), position_ids
        keys = torch.arange(past + tokens, device=x.device)
        mask = (keys <= torch.arange(past, past + tokens, device=x.device)[:, None])[None, None]
        if real is not None:
            mask = mask & real[:, None, None]
        return AttentionLayout(mask, False), position_ids

    def _static_layout(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: IdeficsCache
    ) -> tuple[AttentionLayout, Tensor]:
        tokens = x.shape[1]
        position: Tensor = cache.position  # pyright: ignore[reportAttributeAccessIssue]
        real = cache.key_mask
        assert real is not None
        if attention_mask is not None:
            if attention_mask.shape[1] > real.shape[1] or attention_mask.shape[0] != real.shape[0]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)} but the static cache holds "
                    f"{tuple(real.shape)}; make the cache longer or the mask shorter."
                )
            real[:, : attention_mask.shape[1]] = attention_mask.bool()
        where = position + torch.arange(tokens, device=x.device)
        if position_ids is None:
            counted = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
            position_ids = counted.index_select(1, where)
        keys = torch.arange(real.shape[1], device=x.device)
        mask = (keys <= where[:, None])[None, None] & real[:, None, None]
        return AttentionLayout(mask, False), position_ids

    def _images(
        self,
        batch: int,
        tokens: int,
        x: Tensor,
        pixel_values: Tensor | None,
        image_encoder_embeddings: Tensor | None,
        perceiver_embeddings: Tensor | None,
        image_attention_mask: Tensor | None,
        cache: IdeficsCache | None,
        document_ids: Tensor | None,
        interpolate_pos_encoding: bool,
        skip_unseen: bool,
        noise: Noise | None,
    ) -> tuple[ImageContext | None, Tensor | None]:
        """Encode the images, unless the cache has them, and say who sees which."""
        given = check_image_inputs(
            self.config, batch, pixel_values, image_encoder_embeddings, perceiver_embeddings
        )
        stored = cache.images if cache is not None else None
        if stored is not None:
            return self._cached_images(stored, given, image_attention_mask, batch, tokens), None
        if given is None:
            if image_attention_mask is not None and bool(image_attention_mask.any()):
                raise ValueError(
                    "image_attention_mask lets tokens see images but no images were given; pass pixel_values "
                    "(or embeddings), or leave the mask out for text."
                )
            return None, None
        seen = check_image_mask(image_attention_mask, batch, tokens, given.shape[1])
        if document_ids is not None:
            seen = cut_at_documents(seen, document_ids)
        with_dropout = self.training and self.config.dropout > 0
        slots = image_slots(seen, keep_all=not skip_unseen or with_dropout)
        images = given.flatten(0, 1)
        if skip_unseen and not with_dropout:
            images = images[(slots.flatten() >= 0).nonzero().flatten()]
        states = self._encode(
            images.to(x.device),
            "pixels"
            if pixel_values is not None
            else "encoded"
            if perceiver_embeddings is None
            else "latents",
            interpolate_pos_encoding,
            noise,
        )  # [U, L, E]
        context = ImageContext(states.shape[1], states.flatten(0, 1))
        if with_dropout:
            context.dense_mask = seen.repeat_interleave(states.shape[1], 2)[:, None]
        else:
            context.lists = flat_lists(seen, slots, len(states))
        if cache is not None and cache.keep_images_of is not None:
            looked_at = seen[torch.arange(batch, device=seen.device), cache.keep_images_of]
            cache.focus = context.focus = ImageFocus(slots, looked_at, states.shape[1])
        elif cache is not None:
            cache.images = context.cache = ImageCache(
                batch, given.shape[1], states.shape[1], slots, seen[:, -1].clone()
            )
        if len(states) == slots.numel():
            return context, states.view(batch, -1, *states.shape[1:])
        shape = (slots.numel(), *states.shape[1:])
        place = (slots.flatten() >= 0).nonzero().flatten()
        return context, states.new_zeros(shape).index_copy(0, place, states).view(
            batch, -1, *states.shape[1:]
        )

    def _cached_images(
        self,
        stored: ImageCache,
        given: Tensor | None,
        image_attention_mask: Tensor | None,
        batch: int,
        tokens: int,
    ) -> ImageContext:
        if given is not None and given.shape[1] != stored.per_row:
            raise ValueError(
                f"{given.shape[1]} images a row were given with a cache that holds {stored.per_row}; a "
                "cache keeps the images of its first call, so start a new one to change them."
            )
        if image_attention_mask is None:
            seen = stored.seen[:, None].expand(-1, tokens, -1)
        else:
            seen = check_image_mask(image_attention_mask, batch, tokens, stored.per_row)
            stored.seen.copy_(seen[:, -1])
        return ImageContext(
            stored.image_length, lists=flat_lists(seen, stored.slots, stored.count), cache=stored
        )

    def _encode(self, images: Tensor, kind: str, interpolate: bool, noise: Noise | None) -> Tensor:
        """Images in whatever form they came [U, …] to what the gated blocks read [U, L, E]."""
        if kind == "pixels":
            frozen = not torch.is_grad_enabled() or not any(
                p.requires_grad for p in self.vision_model.parameters()
            )
            if images.is_floating_point():
                images = images.to(self.vision_model.pre_layrnorm.weight.dtype)
            if frozen and not images.requires_grad and not torch.compiler.is_compiling():
                size = _FROZEN_IMAGES.get(images.device.type, _FROZEN_IMAGES_GPU)
                with torch.no_grad():
                    parts = [
                        self.vision_model(part, interpolate, noise=noise).last_hidden_state
                        for part in images.split(size)
                    ]
                images = parts[0] if len(parts) == 1 else torch.cat(parts)
            else:
                images = self.vision_model(images, interpolate, noise=noise).last_hidden_state
        else:
            images = images.to(self.dtype)
        if self.config.use_resampler and kind != "latents":
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                return checkpoint(self.perceiver_resampler, images, use_reentrant=False)  # pyright: ignore
            return self.perceiver_resampler(images)
        return images


def _freeze(module: nn.Module, exceptions: list[str]) -> None:
    kinds: dict[str, tuple[type[nn.Module], ...]] = {
        "LayerNorm": (nn.LayerNorm, IdeficsRMSNorm),
        "Linear": (nn.Linear,),
        "Embedding": (nn.Embedding,),
    }
    spared = tuple(kind for name in exceptions for kind in kinds[name])
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(isinstance(part, spared))
