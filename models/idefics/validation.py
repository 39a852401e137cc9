"""Checks of what users pass to the IDEFICS models; every failure is one sentence on what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import IdeficsCache
from .configuration import IdeficsConfig

# What a call may hold as one dictionary; a list holds the first of these, in this order.
INPUTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "pixel_values",
    "image_encoder_embeddings", "perceiver_embeddings", "image_attention_mask", "labels", "use_cache",
    "interpolate_pos_encoding", "document_ids", "loss_groups", "logits_to_keep",
)  # fmt: skip


def _integer(name: str, value: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor) or value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} is {kind}; give an integer tensor {shape}.")


def check_text(
    config: IdeficsConfig, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[int, int]:
    """Return (B, T) of the text.

    Raises:
        ValueError: both or neither form was given, the shape is wrong, or an id is outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids [B, T] and inputs_embeds [B, T, C].")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; give [B, T, {config.hidden_size}]."
            )
        batch, tokens = inputs_embeds.shape[:2]
    else:
        assert input_ids is not None
        _integer("input_ids", input_ids, "[B, T]")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give [B, T].")
        batch, tokens = input_ids.shape
        if input_ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in torch.aminmax(input_ids))
            if low < 0 or high >= config.total_vocab_size:
                raise ValueError(
                    f"input_ids holds ids from {low} to {high} but the model knows 0 to "
                    f"{config.total_vocab_size - 1} ({config.vocab_size} + {config.additional_vocab_size}); "
                    "use its own tokenizer, or call resize_token_embeddings."
                )
    if batch == 0 or tokens == 0:
        raise ValueError(f"The text is empty (batch {batch}, length {tokens}); give at least one token.")
    return batch, tokens


def check_cache(cache: IdeficsCache | None, config: IdeficsConfig, batch: int) -> int:
    """Return the number of cached tokens.

    Raises:
        ValueError: it is of another model or batch, or is full.
    """
    if cache is None:
        return 0
    if len(cache) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values has {len(cache)} layers but the model {config.num_hidden_layers}; pass "
            "the IdeficsCache that an earlier call of this model returned."
        )
    if cache.batch_size is not None and cache.batch_size != batch:
        raise ValueError(
            f"past_key_values was made for a batch of {cache.batch_size} but this one has {batch} rows; "
            "pass the cache of the same batch, or none."
        )
    if cache.static:
        return 0  # its length is a tensor, read on the device
    return cache.get_seq_length()


def check_documents(
    document_ids: Tensor | None,
    batch: int,
    tokens: int,
    cache: IdeficsCache | None,
    attention_mask: Tensor | None,
) -> None:
    """
    Raises:
        ValueError: ``document_ids`` has the wrong shape or kind, or comes with a cache.
    """
    if document_ids is None:
        return
    _integer("document_ids", document_ids, "[B, T], -1 for padding")
    if document_ids.shape != (batch, tokens):
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)}; give [{batch}, {tokens}] like the text."
        )
    if cache is not None:
        raise ValueError("document_ids came with past_key_values; packed rows cannot be continued.")
    if (
        attention_mask is not None
        and not torch.compiler.is_compiling()
        and not torch.equal(attention_mask.bool(), document_ids >= 0)
    ):
        raise ValueError(
            "attention_mask disagrees with document_ids about what is padding; leave attention_mask out of "
            "packed batches."
        )


def check_text_mask(
    attention_mask: Tensor | None, batch: int, total: int, new: int, cache: IdeficsCache | None
) -> Tensor | None:
    """Return which of the cached and new tokens are real, bool [B, K], or None if all are.

    Raises:
        ValueError: the mask's shape is not [B, K].
    """
    before = cache.key_mask if cache is not None else None
    if attention_mask is None:
        if before is None:
            return None
        return torch.cat((before, before.new_ones(batch, new)), dim=1)
    if attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give [{batch}, {total}]: "
            f"{total - new} cached and {new} new tokens."
        )
    real = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and bool(real.all()) else real


def check_image_inputs(
    config: IdeficsConfig,
    batch: int,
    pixel_values: Tensor | None,
    image_encoder_embeddings: Tensor | None,
    perceiver_embeddings: Tensor | None,
) -> Tensor | None:
    """Return the one form in which images were given.

    Raises:
        ValueError: there are several, or its shape or batch does not fit.
    """
    vision, width = config.vision_config, config.vision_config.hidden_size
    forms = {
        "pixel_values": (pixel_values, 5, f"[B, N, {vision.num_channels}, height, width]"),
        "image_encoder_embeddings": (image_encoder_embeddings, 4, f"[B, N, tokens, {width}]"),
        "perceiver_embeddings": (perceiver_embeddings, 4, f"[B, N, latents, {width}]"),
    }
    given = [(name, *form) for name, form in forms.items() if form[0] is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(item[0] for item in given)
        raise ValueError(f"Images were given twice, as {names}; give one of them.")
    name, images, dims, shape = given[0]
    if not isinstance(images, Tensor):
        raise ValueError(
            f"{name} is a {type(images).__name__}; give one tensor {shape}: images of mixed sizes are "
            "brought to one size by IdeficsProcessor."
        )
    if images.dim() != dims or (dims == 4 and images.shape[3] != width):
        raise ValueError(f"{name} has shape {tuple(images.shape)}; give {shape}.")
    if images.shape[0] != batch:
        raise ValueError(
            f"{name} has {images.shape[0]} rows but the text {batch}; give one row of images a text."
        )
    if name == "perceiver_embeddings" and not config.use_resampler:
        raise ValueError(
            "perceiver_embeddings were given to a model without a resampler (use_resampler=False); give "
            "pixel_values or image_encoder_embeddings."
        )
    if images.shape[1] == 0:
        raise ValueError(
            f"{name} holds no images (shape {tuple(images.shape)}); leave it out for text alone."
        )
    return images


def check_image_mask(mask: Tensor | None, batch: int, tokens: int, images: int) -> Tensor:
    """Return the mask as bool [B, T, N].

    Raises:
        ValueError: it is missing, or its shape does not fit the text and the images.
    """
    if mask is None:
        raise ValueError(
            "Images were given without image_attention_mask [B, T, N], which says which token sees which "
            "image; IdeficsProcessor makes it."
        )
    if mask.dim() != 3 or mask.shape[:2] != (batch, tokens):
        raise ValueError(
            f"image_attention_mask has shape {tuple(mask.shape)}; give [{batch}, {tokens}, images] for this "
            "text."
        )
    if mask.shape[2] != images:
        raise ValueError(
            f"image_attention_mask speaks of {mask.shape[2]} images a row but {images} were given; make "
            "them agree."
        )
    return mask.bool()
