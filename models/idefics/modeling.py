"""The IDEFICS decoder: a LLaMA with a gated cross-attention block before every few of its layers.

Legend: B batch, T new tokens, K tokens so far, N images a row, S tokens of an encoded image, L keys an image
(latents of the resampler, or S), C hidden size, E image width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..inputs import accepts_collections
from ..noise import Noise
from ..outputs import ModelOutput
from ..trainable import resized_rows
from .attention import AttentionLayout, IdeficsAttention
from .cache import IdeficsCache
from .configuration import IdeficsConfig
from .cross_attention import IdeficsGatedCrossAttentionLayer
from .embedding import IdeficsDecoupledEmbedding
from .image_context import ImageContext
from .image_intake import ImageInputs, encode_images, read_images
from .layers import IdeficsMLP, IdeficsRMSNorm, dropout, product_dtype, rotary_tables
from .layout import drop_padding, lay_out, restore_padding, within_window
from .perceiver import IdeficsPerceiverResampler
from .pretrained import IdeficsPreTrainedModel
from .validation import INPUTS, check_cache, check_documents, check_text
from .vision_towers import build_vision_tower

# Where the names of the decoder's weights begin.
DECODER_PARTS = (
    "embed_tokens.", "vision_model.", "perceiver_resampler.", "layers.", "gated_cross_attn_layers.", "norm.",
)  # fmt: skip


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
    """One layer of LLaMA or a relative, x [B, T, C] -> ([B, T, C], probabilities or None)."""

    def __init__(self, config: IdeficsConfig, index: int) -> None:
        super().__init__()
        self.self_attn = IdeficsAttention(config, index)
        self.mlp = IdeficsMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias
        )
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
        self.vision_model = build_vision_tower(config.vision_config)
        if config.use_resampler:
            self.perceiver_resampler = IdeficsPerceiverResampler(config)
        self.layers = nn.ModuleList(IdeficsDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gated_cross_attn_layers = nn.ModuleList(
            IdeficsGatedCrossAttentionLayer(config, i) for i in range(config.gated_blocks)
        )
        self.norm = IdeficsRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.reset_parameters()
        self.freeze_relevant_params()
        self.follow_settings()

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
                if isinstance(part, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(part.weight, std=deviation)
                    if isinstance(part, nn.Linear) and part.bias is not None:
                        nn.init.zeros_(part.bias)
                elif isinstance(part, IdeficsRMSNorm):
                    nn.init.ones_(part.weight)
        self.reset_gated_blocks()
        self.vision_model.reset_parameters()
        if self.config.use_resampler:
            self.perceiver_resampler.reset_parameters()

    def reset_gated_blocks(self) -> None:
        """Draw what is added to the language model, the gates as ``alpha_initializer`` says."""
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

    def freeze_relevant_params(self, config: IdeficsConfig | None = None) -> None:
        """Freeze what the configuration's ``freeze_…`` fields name."""
        config = config or self.config
        if config.freeze_text_layers:
            self.freeze_text_layers(config.freeze_text_module_exceptions)
        if config.freeze_vision_layers:
            self.freeze_vision_layers(config.freeze_vision_module_exceptions)

    def freeze_text_layers(self, module_exceptions: Iterable[str | type] = ()) -> None:
        """Freeze base embeddings, decoder layers and final norm, but for layers of the named kinds."""
        exceptions = list(module_exceptions)
        spared = {"Embedding", "IdeficsDecoupledEmbedding", nn.Embedding, IdeficsDecoupledEmbedding}
        self.embed_tokens.weight.requires_grad_(bool(spared & set(exceptions)))
        for module in (self.layers, self.norm):
            _freeze(module, exceptions)

    def freeze_vision_layers(self, module_exceptions: Iterable[str | type] = ()) -> None:
        """Freeze the image encoder, but for layers of the named kinds."""
        _freeze(self.vision_model, list(module_exceptions))

    def get_input_embeddings(self) -> IdeficsDecoupledEmbedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: IdeficsDecoupledEmbedding) -> None:
        self.embed_tokens = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> IdeficsDecoupledEmbedding:
        """Make room for ``new_num_tokens`` tokens in all, as that of the whole model does, which has a head too.

        Raises:
            ValueError: fewer tokens than the base vocabulary are asked for.
        """
        if new_num_tokens is None:
            new_num_tokens = self.config.total_vocab_size
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of!r} is not a positive integer.")
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        count = new_num_tokens - self.config.vocab_size
        if count < 0:
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) is less than the {self.config.vocab_size} base "
                "tokens; only additional tokens can be added or removed."
            )
        table = self.embed_tokens
        old = table.additional_embedding.weight if table.additional_embedding is not None else None
        deviation = None if mean_resizing else self.config.initializer_range
        table.resize(resized_rows(old, table.weight, count, deviation))
        self.config.additional_vocab_size = count
        return table

    @classmethod
    def rename(cls, name: str) -> str | None:
        if name.startswith("lm_head."):
            return None
        return super().rename(name.removeprefix("model."))

    @accepts_collections(*INPUTS)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
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
                those of the call that brought them: images given again with it are not encoded again. A tuple of
                (key, value) [B, H, K, D] a layer serves as well; it brings no images.
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
        elif use_cache and self.gradient_checkpointing and self.training:
            warnings.warn(
                "use_cache=True does not go with gradient checkpointing, which reads the layers twice; no cache is "
                "kept.",
                stacklevel=2,
            )
            use_cache = False
        cache = None if past_key_values is None else IdeficsCache.of(past_key_values)
        past = check_cache(cache, config, batch)
        check_documents(document_ids, batch, tokens, cache, attention_mask)
        if cache is None and use_cache:
            cache = IdeficsCache(config.num_hidden_layers)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        layout, position_ids = lay_out(
            config, self.training, x, attention_mask, position_ids, document_ids, cache, past, want_weights
        )
        if not self.training:
            noise = None
        layout, real = drop_padding(layout, x.device)
        if noise is not None:
            places = torch.arange(batch * tokens, device=x.device) if real is None else real
            noise = replace(noise, tokens=noise.parts(places, tokens))
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        resampler = self.perceiver_resampler if config.use_resampler else None

        def encode(chosen: Tensor, form: str, own: Noise | None) -> Tensor:
            return encode_images(
                self.vision_model,
                resampler,
                chosen.to(x.device),
                form,
                own,
                dtype=self.dtype,
                interpolate=interpolate_pos_encoding,
                recompute=recompute,
            )

        images, image_states = read_images(
            config,
            ImageInputs(
                pixel_values,
                image_encoder_embeddings,
                perceiver_embeddings,
                image_attention_mask,
                skip_unseen=document_ids is not None if skip_unseen_images is None else skip_unseen_images,
            ),
            encode,
            batch=batch,
            tokens=tokens,
            with_dropout=self.training and config.dropout > 0,
            cache=cache,
            document_ids=document_ids,
            noise=noise,
            real=real,
        )
        if cache is not None:
            cache.batch_size = batch
        if real is not None:
            x = x.flatten(0, 1)[real][None]
            position_ids = position_ids.expand(batch, tokens).flatten()[real][None]
        x, states, attentions = self.decode(
            x, position_ids, layout, images, cache, noise, want_states, want_weights
        )
        if real is not None:
            x = restore_padding(x, real, batch, tokens)
            states = states and tuple(restore_padding(state, real, batch, tokens) for state in states)
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
        rotary = rotary_tables(position_ids, config.head_dim, config.rope_parameters, product_dtype(x))
        near = layout
        if config.sliding_window is not None:
            near = within_window(layout, config.sliding_window, x.shape[1], cache, x.device)
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
            seen = layout if config.window_of(index) is None else near
            if recompute:
                x, weights = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
                    layer, x, rotary, seen, memory, noise, want_weights, use_reentrant=False
                )
            else:
                x, weights = layer(x, rotary, seen, memory, noise, want_weights)
            attentions.append(weights)
            if want_states and index + 1 < len(self.layers):
                states.append(x)
        x = self.norm(x)
        if want_states:
            states.append(x)
        return x, tuple(states) if want_states else None, tuple(attentions) if want_weights else None


def _freeze(module: nn.Module, exceptions: list[str | type]) -> None:
    """Freeze all but the modules of the named kinds, and what stands in these."""
    names = {
        "IdeficsRMSNorm" if e == "LayerNorm" else e if isinstance(e, str) else e.__name__ for e in exceptions
    }
    names |= {e for e in exceptions if isinstance(e, str)}
    module.requires_grad_(False)
    for part in module.modules():
        if names & {kind.__name__ for kind in type(part).__mro__}:
            part.requires_grad_(True)
