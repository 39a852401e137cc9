"""What each word of a prompt looks at: attention of the gated blocks over the groups of a GroupViT tower, as masks.

Legend: T tokens, N images, L keys an image, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .modeling import IdeficsModel
from .towers.groupvit import IdeficsGroupViTTransformer, attention_map


@torch.no_grad()
def image_attention(
    model: Any, input_ids: Tensor, pixel_values: Tensor, image_attention_mask: Tensor
) -> Tensor:
    """How the tokens of one prompt attend to its images' keys: float32 [blocks, H, T, N, L].

    The weights of a token sum to 1 over the images that it sees, and are zero where it sees none. The fused operation
    never builds them, so they are computed here beside it, from the inputs of every gated block.

    Args:
        model: an `IdeficsForVisionText2Text` or `IdeficsModel`, with any tower, with a resampler or without.
        input_ids: int [1, T].
        pixel_values: [1, N, 3, height, width].
        image_attention_mask: [1, T, N], as `IdeficsProcessor` makes it.

    Raises:
        ValueError: there are several prompts, or the inputs do not fit the model.
    """
    decoder: IdeficsModel = model if isinstance(model, IdeficsModel) else model.model
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; give one prompt [1, T], without padding."
        )
    found: list[Tensor] = []

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        x, images = inputs[:2]
        shape = (-1, module.num_heads, module.head_dim)
        query = module.q_proj(x[0]).view(shape)
        query = module.q_layer_norm(query) if module.qk_layer_norms else query
        key, _ = module.project_images(images.states)
        score = torch.einsum("thd,khd->htk", query.float(), key.float()) * module.head_dim**-0.5
        seen = image_attention_mask[0].bool().repeat_interleave(images.image_length, 1)
        weights = score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        found.append(weights.unflatten(-1, (-1, images.image_length)))

    training, hooks = decoder.training, []
    try:
        decoder.eval()
        hooks = [
            block.cross_attn.register_forward_pre_hook(look)  # pyright: ignore[reportAttributeAccessIssue]
            for block in decoder.gated_cross_attn_layers
        ]
        decoder(
            input_ids,
            pixel_values=pixel_values,
            image_attention_mask=image_attention_mask,
            use_cache=False,
            skip_unseen_images=False,
        )
    finally:
        decoder.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@torch.no_grad()
def word_maps(
    model: Any,
    input_ids: Tensor,
    pixel_values: Tensor,
    image_attention_mask: Tensor,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Where the tokens of one prompt look in its images: [T, N, height, width], of values from 0 to 1.

    The mean over blocks and heads of `image_attention`, spread over the pixels of each group by
    `towers.groupvit.attention_map`.

    Args:
        model, input_ids, pixel_values, image_attention_mask: as `image_attention`.
        size: height and width of the maps; the grid of patches by default.

    Raises:
        ValueError: as `image_attention`, or the model's keys are not the groups of a GroupViT.
    """
    decoder: IdeficsModel = model if isinstance(model, IdeficsModel) else model.model
    tower = decoder.vision_model
    if not isinstance(tower, IdeficsGroupViTTransformer) or decoder.config.use_resampler:
        kind = decoder.config.vision_config.model_type
        raise ValueError(
            f"The model reads images through a tower of kind {kind!r} "
            f"{'with' if decoder.config.use_resampler else 'without'} a resampler; maps of words need the groups of a "
            "GroupViT, without a resampler."
        )
    weights = image_attention(model, input_ids, pixel_values, image_attention_mask).mean((0, 1))  # [T, N, L]
    pixels = pixel_values[0]
    assignments = tower(pixels.to(tower.dtype), output_attentions=True).attentions
    grid = (pixels.shape[-2] // tower.embeddings.patch[0], pixels.shape[-1] // tower.embeddings.patch[1])
    assert assignments is not None
    maps = attention_map([a.float() for a in assignments], weights.transpose(0, 1), size, grid=grid)
    return maps.transpose(0, 1)
