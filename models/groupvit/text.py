"""The text tower: a causal transformer pooled at the end token.

B captions, T tokens, L real tokens of all captions together, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..inputs import accepts_collections
from ..noise import Noise
from ..outputs import BaseModelOutputWithPooling
from .checks import active_noise, check_text
from .configuration import GroupViTTextConfig
from .initialization import initialize_text
from .layers import GroupViTEncoderLayer, recomputes, run
from .pretrained import GroupViTPreTrainedModel


class GroupViTTextEmbeddings(nn.Module):
    def __init__(self, config: GroupViTTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        std = config.initializer_range * config.initializer_factor
        nn.init.normal_(self.token_embedding.weight, std=std)
        nn.init.normal_(self.position_embedding.weight, std=std / 2)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class GroupViTTextEncoder(nn.Module):
    def __init__(self, config: GroupViTTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            GroupViTEncoderLayer(config, f"text.layer{i}") for i in range(config.num_hidden_layers)
        )


def end_positions(input_ids: Tensor, eos_token_id: int) -> Tensor:
    """Where each caption [B, T] is pooled, [B]: its first end token, or (old rule) its highest id.

    A caption without an end token is pooled at its first token, as in Transformers.
    """
    if eos_token_id == 2:
        return input_ids.int().argmax(-1)
    return (input_ids == eos_token_id).int().argmax(-1)


class GroupViTTextTransformer(nn.Module):
    """The tower without its loader; `GroupViTTextModel` and `GroupViTModel` hold one."""

    def __init__(self, config: GroupViTTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = GroupViTTextEmbeddings(config)
        self.encoder = GroupViTTextEncoder(config)
        self.gradient_checkpointing = False
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        initialize_text(self, config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling:
        """Token ids [B, T] to states [B, T, C] and the state at the end token [B, C]."""
        check_text(self, input_ids, attention_mask, position_ids, self.config)
        noise = active_noise(self, noise)
        x = self.embeddings(input_ids, position_ids)
        mask = None if attention_mask is None else _causal_padding_mask(attention_mask, x.dtype)
        hidden_states: tuple[Tensor, ...] = (x,)
        attentions: tuple[Tensor, ...] = ()
        for layer in self.encoder.layers:
            x, weights = run(
                layer,
                x,
                mask=mask,
                causal=mask is None,
                output_attentions=output_attentions,
                noise=noise,
                recompute=recomputes(self),
            )
            hidden_states = (*hidden_states, x)
            if weights is not None:
                attentions = (*attentions, weights)
        last = self.final_layer_norm(x)
        rows = torch.arange(last.shape[0], device=last.device)
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=last[rows, end_positions(input_ids, self.config.eos_token_id)],
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def pooled(self, input_ids: Tensor, noise: Noise | None = None) -> Tensor:
        """States at the end tokens alone, [B, T] -> [B, C]: the training path.

        Tokens after the end token cannot influence it in a causal tower, so they are cut off: norms,
        projections and MLPs run on the real tokens of all captions as one [L, C] matrix, only attention sees
        the rectangle. Padding stands on the right. The last layer computes the end tokens alone. A compiled
        model keeps the rectangle, whose shape does not depend on the captions.
        """
        dropping = self.training and self.config.attention_dropout > 0.0
        if dropping or torch.compiler.is_compiling():
            output = self(input_ids, noise=noise).pooler_output
            assert output is not None
            return output
        check_text(self, input_ids, None, None, self.config)
        ends = end_positions(input_ids, self.config.eos_token_id)
        length = int(ends.max()) + 1 if ends.numel() else 1
        real = torch.arange(length, device=ends.device)[None] <= ends[:, None]
        where = real.flatten().nonzero()[:, 0]
        lengths = ends + 1
        last_rows = lengths.cumsum(0) - 1
        x = self.embeddings(input_ids[:, :length]).flatten(0, 1).index_select(0, where)
        layers = list(self.encoder.layers)
        for layer in layers:
            assert isinstance(layer, GroupViTEncoderLayer)
            final = layer is layers[-1]
            x = run(layer.packed, x, where, last_rows, real.shape, final, recompute=recomputes(self))
        if not layers:
            x = x.index_select(0, last_rows)
        return self.final_layer_norm(x)


def _causal_padding_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T] from [B, T] (nonzero: a real token).

    The finite minimum, not infinity: rows that may see nothing (padding on the left) become an average
    instead of NaN.
    """
    length = attention_mask.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    allowed = past & (attention_mask != 0)[:, None, None, :]
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


class GroupViTTextModel(GroupViTPreTrainedModel):
    """The text tower alone; loads from its own checkpoints and from those of the whole model."""

    config_class = GroupViTTextConfig
    tower = "text"

    def __init__(self, config: GroupViTTextConfig):
        super().__init__(config)
        self.config: GroupViTTextConfig = config
        self.text_model = GroupViTTextTransformer(config)
        self.follow_settings()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    @accepts_collections("input_ids", "attention_mask", "position_ids")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode captions.

        Args:
            input_ids: [B, T] token ids, each caption with its end token (one without is pooled at its first
                token, with a warning).
            attention_mask: [B, T], 0 at padding.
            position_ids: [B, T] or [1, T]; None counts from 0.
            output_attentions: return the softmax weights [B, H, T, T] of each layer.
            output_hidden_states: return the input of each layer and the output of the last.
            return_dict: False returns the tuple of what is not None.
            noise: randomness in training mode; None draws a seed from torch's default generator.

        Raises:
            ValueError: no ids, wrong shapes or types, or ids outside the vocabulary.
        """
        if input_ids is None:
            raise ValueError("GroupViTTextModel was given no input_ids; pass token ids [B, T].")
        config = self.config
        output = self.text_model(
            input_ids,
            attention_mask,
            position_ids,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            noise=noise,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


# The name of TensorFlow's class, whose checkpoints and ways of calling are this one's too.
TFGroupViTTextModel = GroupViTTextModel
