"""The arithmetic of a training step, for the utilisation (MFU) that a run reports.

Model FLOPs as PaLM counts them (Chowdhery et al. 2022, appendix B): two for every multiply-add of the matrix products
and attentions that the model's mathematics needs forward, as many again for the gradients of activations and of
trained weights. Work that an implementation adds (recomputed activations, masked attention scores) does not count, so
the figures of two implementations compare.

Legend: T text tokens, U images, S tokens of an encoded image, L keys an image, C hidden size, E image width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ....models.idefics import IdeficsConfig

# Dense bfloat16 or float16 matrix products a second by compute capability: A100, H100, B200.
_PEAKS = {(8, 0): 312e12, (9, 0): 989e12, (10, 0): 2250e12}


@dataclass(frozen=True)
class StepFlops:
    """Forward FLOPs of the parts of an IDEFICS, and what a training step makes of them."""

    vision: Any
    resampler: Any
    text: Any
    gated: Any
    head: Any

    @property
    def forward(self) -> Any:
        return self.vision + self.resampler + self.text + self.gated + self.head

    def training(self, *, text_trains: bool, vision_trains: bool, head_trains: bool) -> Any:
        """Forward and backward. A frozen text model still passes gradients on to the gated blocks below it; a
        frozen image encoder passes none."""
        text = (3 if text_trains else 2) * self.text
        vision = (3 if vision_trains else 1) * self.vision
        head = (3 if head_trains else 2) * self.head
        return text + vision + head + 3 * (self.gated + self.resampler)


def idefics_flops(
    config: IdeficsConfig,
    *,
    tokens: Any,
    images: Any,
    predicted: Any,
    pairs: Any,
    looks: Any,
    near: Any = None,
) -> StepFlops:
    """FLOPs of a forward pass.

    Args:
        config: of the model.
        tokens: real text tokens.
        images: images that some token looks at.
        predicted: tokens with a label.
        pairs: (token, token before it or itself) within documents: what causal attention scores.
        looks: (token, image) pairs of the image attention mask. Counts are numbers or scalar tensors.
        near: of the ``pairs``, those within the window of the layers that have one; all of them by default.
    """
    vision, perceiver = config.vision_config, config.perceiver_config
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, grouped = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    sliding = sum(config.window_of(layer) is not None for layer in range(layers))
    scored = (layers - sliding) * pairs + sliding * (pairs if near is None else near)
    side, seen = vision.embed_dim, vision.num_tokens
    keys, resample = seen, 0.0
    if config.use_resampler:
        keys = perceiver.resampler_n_latents
        across = perceiver.resampler_n_heads * perceiver.resampler_head_dim
        context = seen + keys
        each = 2 * context * side * across + 2 * keys * side * across  # keys and values; queries and output
        each += 2 * keys * context * across + 2 * keys * side * 4 * side  # attention; the MLP
        resample = perceiver.resampler_depth * each
    text = layers * tokens * (2 * width * (heads + grouped) + 3 * width * inner) + 2 * scored * heads
    gated = config.gated_blocks * (
        tokens * (2 * width * heads + 3 * width * inner)
        + images * keys * 2 * side * heads
        + 2 * looks * keys * heads
    )
    head = predicted * width * config.total_vocab_size
    return StepFlops(
        *(2.0 * count for count in (images * vision.multiply_adds, images * resample, text, gated, head))
    )


def peak_flops(device: torch.device) -> float | None:
    """Published peak of a device in half precision, FLOP a second; None where it is not known."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _PEAKS.get(torch.cuda.get_device_capability(device))
