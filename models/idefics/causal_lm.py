"""IDEFICS with its head: logits, the loss, and text generation.

Legend: B batch, T new tokens, K tokens so far, N images a row, L keys an image, C hidden size, V all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointFolder
from ..inputs import accepts_collections
from ..noise import Noise
from ..outputs import ModelOutput
from ..trainable import resized_rows
from .cache import IdeficsCache
from .configuration import IdeficsConfig
from .embedding import IdeficsDecoupledEmbedding, IdeficsDecoupledLinear
from .generation.generate import GenerationMixin
from .generation.generation_config import FILE as GENERATION_FILE
from .generation.generation_config import GenerationConfig
from .loss import IGNORED, LossSums
from .modeling import DECODER_PARTS, IdeficsBaseModelOutputWithPast, IdeficsModel
from .pretrained import IdeficsPreTrainedModel
from .validation import INPUTS


def _nothing() -> None:
    return None


@dataclass
class IdeficsCausalLMOutputWithPast(ModelOutput):
    """What ``IdeficsForVisionText2Text`` returns.

    Attributes:
        loss: Float32 scalar, where labels were given: mean over predicted tokens, z-loss included.
        logits: [B, T, V]. With labels they are computed when they are first asked for: the loss does not
            need them.
        past_key_values, hidden_states, attentions, image_hidden_states: See
            ``IdeficsBaseModelOutputWithPast``.
        loss_sum: Float32 scalar, the summed negative log-likelihood, z-loss not included.
        token_count: Float32 scalar, the number of predicted tokens.
        z_loss: Float32 scalar, the part of ``loss`` that is z-loss.
        group_losses: Float32 [2, G], where ``loss_groups`` were given: summed negative log-likelihood and
            number of predicted tokens of each group.
    """

    loss: Tensor | None = None
    logits: Tensor | None = field(default_factory=_nothing)  # pyright: ignore[reportAssignmentType]
    past_key_values: IdeficsCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    loss_sum: Tensor | None = None
    token_count: Tensor | None = None
    z_loss: Tensor | None = None
    group_losses: Tensor | None = None

    def defer_logits(self, compute: Callable[[], Tensor]) -> None:
        """Leave the logits to be computed on first use."""
        del self.__dict__["logits"]
        self.__dict__["_compute_logits"] = compute

    def __getstate__(self) -> dict[str, Any]:
        """With the logits: what would compute them cannot be pickled or copied."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __getattr__(self, name: str) -> Any:
        if name == "logits" and "_compute_logits" in self.__dict__:
            self.__dict__["logits"] = self.__dict__.pop("_compute_logits")()
            return self.__dict__["logits"]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def keys(self) -> tuple[str, ...]:
        deferred = "_compute_logits" in self.__dict__
        names = self.__dataclass_fields__
        return tuple(
            n for n in names if (deferred if n == "logits" and deferred else self.__dict__[n] is not None)
        )

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, getattr(self, name)) for name in self.keys())

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.values()[key]


class IdeficsForVisionText2Text(IdeficsPreTrainedModel, GenerationMixin):
    """IDEFICS as users know it: images and text in, the next token's logits out."""

    base_model_prefix: ClassVar[str] = "model"

    def __init__(self, config: IdeficsConfig) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.model = IdeficsModel(config)
        self.lm_head = IdeficsDecoupledLinear(
            config.hidden_size, config.vocab_size, config.additional_vocab_size, config.freeze_lm_head
        )
        if not self.lm_head.weight.is_meta:
            for part in self.lm_head.modules():
                if isinstance(part, (nn.Linear, IdeficsDecoupledLinear)):
                    nn.init.normal_(part.weight, std=config.initializer_range)
        self.tie_weights()

    @classmethod
    def rename(cls, name: str) -> str | None:
        # A file of the decoder alone has no prefix.
        return super().rename(f"model.{name}" if name.startswith(DECODER_PARTS) else name)

    def read_beside(self, folder: CheckpointFolder) -> None:
        if path := folder.find(GENERATION_FILE):
            self.generation_config = GenerationConfig.from_file(path)

    def write_beside(self, folder: Path) -> None:
        if self.generation_config.settings:
            self.generation_config.save_pretrained(folder)
        else:
            (folder / GENERATION_FILE).unlink(missing_ok=True)

    def tie_weights(self) -> None:
        """Share the embedding tables with the head if the configuration says so."""
        if not self.config.tie_word_embeddings:
            return
        frozen = not self.lm_head.weight.requires_grad
        self.lm_head.weight = self.model.embed_tokens.weight
        if frozen:
            self.lm_head.weight.requires_grad_(False)
        embedding, rows = self.model.embed_tokens.additional_embedding, self.lm_head.additional_fc
        if embedding is not None and rows is not None:
            rows.weight = embedding.weight

    def get_input_embeddings(self) -> IdeficsDecoupledEmbedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: IdeficsDecoupledEmbedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> IdeficsDecoupledLinear:
        return self.lm_head

    def set_output_embeddings(self, value: IdeficsDecoupledLinear) -> None:
        self.lm_head = value

    def get_decoder(self) -> IdeficsModel:
        return self.model

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> IdeficsDecoupledEmbedding:
        """Make room for ``new_num_tokens`` tokens in all; the added ones join the additional vocabulary.

        New rows start at the mean of the base rows, of the embeddings and of the head.

        Args:
            new_num_tokens: as many as now, if None.
            pad_to_multiple_of: round their number up to a multiple of this, for tensor cores.
            mean_resizing: False draws new rows as a new model would.

        Raises:
            ValueError: fewer tokens than the base vocabulary are asked for.
        """
        embed = self.model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        head = self.lm_head
        old_head = head.additional_fc.weight if head.additional_fc is not None else None
        deviation = None if mean_resizing else self.config.initializer_range
        head.resize(resized_rows(old_head, head.weight, embed.num_additional_embeddings, deviation))
        self.tie_weights()
        return embed

    def merge_additional_vocabulary(self) -> None:
        """Make the added tokens base tokens: ids and logits stay as they are, ``additional_vocab_size`` becomes 0.

        Transformers (4.57 and 5.x) computes no loss where there is an additional vocabulary; it can train what
        is saved after this.
        """
        self.model.embed_tokens.merge()
        self.lm_head.merge()
        self.config.vocab_size, self.config.additional_vocab_size = self.config.total_vocab_size, 0
        self.tie_weights()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Arguments of ``forward`` for what follows a cache: the form in which adapter libraries ask for a step.

        ``generate`` of this class does not need it.

        Args:
            input_ids: int [B, K], cached tokens included.
            image_attention_mask: [B, T, N] of the prompt; new tokens see what its last token sees.
        """
        past = 0 if past_key_values is None else IdeficsCache.of(past_key_values).get_seq_length()
        images = {
            name: others[name]
            for name in ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")
            if others.get(name) is not None
        }
        further = {name: value for name, value in others.items() if name not in images and value is not None}
        text = {"input_ids": input_ids[:, past:]}
        if inputs_embeds is not None and past == 0:
            text = {"inputs_embeds": inputs_embeds}
        if image_attention_mask is not None:
            missing = input_ids.shape[1] - image_attention_mask.shape[1]
            if missing > 0:
                seen = image_attention_mask[:, -1:].expand(-1, missing, -1)
                image_attention_mask = torch.cat((image_attention_mask, seen), 1)
            images["image_attention_mask"] = image_attention_mask[:, past:]
        return {
            **further,
            **text,
            **images,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }

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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        *,
        shift_labels: Tensor | None = None,
        logits_to_keep: int = 0,
        document_ids: Tensor | None = None,
        z_loss: float = 0.0,
        z_loss_exclude: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_groups: Tensor | None = None,
        noise: Noise | None = None,
        skip_unseen_images: bool | None = None,
    ) -> IdeficsCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model; arguments not named here are those of ``IdeficsModel.forward``.

        Args:
            labels: int64 [B, T], -100 where nothing is to be predicted; token t predicts label t + 1. Padding
                (by ``attention_mask`` or ``document_ids``) and the first token of a packed document are never
                predicted. No logits are materialised for the loss.
            shift_labels: int64 [B, T] in the place of ``labels``: token t predicts label t itself, where it is not
                -100. Trainers that cut sequences into parts over ranks give these.
            logits_to_keep: Logits of only this many last tokens; 0 keeps all.
            z_loss: Weight of the mean squared log-sum-exp added to the loss.
            z_loss_exclude: int64 ids whose predictions take no part in it.
            num_items_in_batch: Divide the summed loss by this instead of the number of predicted tokens, to
                accumulate a batch over several calls.
            loss_groups: int64 [B, T], group of each token (its source, say), to have their losses apart.

        Raises:
            ValueError: Shapes, counts or ids do not fit each other or the model.
        """
        labels = labels if shift_labels is None else shift_labels
        if labels is not None:
            self._check_labels(labels, input_ids if input_ids is not None else inputs_embeds)
            use_cache = False if use_cache is None else use_cache
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_encoder_embeddings=image_encoder_embeddings,
            perceiver_embeddings=perceiver_embeddings,
            image_attention_mask=image_attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            document_ids=document_ids,
            noise=noise,
            skip_unseen_images=skip_unseen_images,
        )
        assert isinstance(outputs, IdeficsBaseModelOutputWithPast)
        hidden = outputs.last_hidden_state
        assert hidden is not None
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        result = IdeficsCausalLMOutputWithPast(
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        if labels is None:
            result.logits = self.lm_head(kept)
        else:
            if shift_labels is None:
                predicted = predicted_tokens(labels, attention_mask, document_ids)
                rows, targets = hidden[:, :-1], labels[:, 1:]
                groups = None if loss_groups is None else loss_groups[:, 1:]
            else:
                predicted, rows, targets, groups = labels != IGNORED, hidden, labels, loss_groups
            if torch.compiler.is_compiling():
                # How many are predicted is not known when a graph is made: the others are read, and left out.
                rows, targets = rows.flatten(0, 1), targets.masked_fill(~predicted, IGNORED).flatten()
                groups = None if groups is None else groups.flatten()
            else:
                rows, targets = rows[predicted], targets[predicted]
                groups = None if groups is None else groups[predicted]
            sums = self.lm_head(rows, targets, z_loss_exclude, groups, want_z=z_loss != 0)
            self._set_loss(result, sums, z_loss, num_items_in_batch)
            result.defer_logits(lambda: self.lm_head(kept))
        return (
            result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()
        )

    @staticmethod
    def _set_loss(
        result: IdeficsCausalLMOutputWithPast,
        sums: LossSums,
        z_loss: float,
        num_items_in_batch: Tensor | float | None,
    ) -> None:
        total = sums.rows if num_items_in_batch is None else num_items_in_batch
        if not isinstance(total, Tensor):
            total = torch.tensor(float(total), device=sums.nll.device)
        total = total.float().clamp(min=1.0)
        result.loss = sums.nll / total
        result.loss_sum, result.token_count = sums.nll.detach(), sums.rows
        result.group_losses = sums.groups
        if z_loss:
            z_total = sums.z_rows.clamp(min=1.0) if num_items_in_batch is None else total
            extra = z_loss * sums.z / z_total
            result.loss = result.loss + extra
            result.z_loss = extra.detach()

    def _check_labels(self, labels: Tensor, text: Tensor | None) -> None:
        if text is not None and labels.shape != text.shape[:2]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; give {list(text.shape[:2])} like the text: the "
                "model shifts them itself."
            )
        if labels.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = int(torch.where(labels == -100, 0, labels).min()), int(labels.max())
        if low < 0 or high >= self.config.total_vocab_size:
            raise ValueError(
                f"labels holds values from {low} to {high}; give ids from 0 to "
                f"{self.config.total_vocab_size - 1}, and -100 where nothing is to be predicted."
            )


# Transformers' Trainer takes every argument with "label" in its name for one that each batch has, and computes no
# loss where one is missing.
_shown = signature(IdeficsForVisionText2Text.forward)
IdeficsForVisionText2Text.forward.__signature__ = _shown.replace(  # type: ignore[attr-defined]
    parameters=[own for name, own in _shown.parameters.items() if name != "shift_labels"]
)


def predicted_tokens(labels: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Which of labels[:, 1:] are predicted from the token before them: bool [B, T - 1]."""
    predicted = labels[:, 1:] != -100
    if attention_mask is not None:
        predicted = predicted & attention_mask[:, -labels.shape[1] :][:, 1:].bool()
    if document_ids is not None:
        predicted = predicted & (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    return predicted


def without_tokens(labels: Tensor, ids: Tensor | None) -> Tensor:
    """Labels int64 [B, T] in which the tokens ``ids`` (those of images) are nothing to predict; None leaves all."""
    if ids is None:
        return labels
    return labels.masked_fill(torch.isin(labels, ids.to(labels.device)), -100)
