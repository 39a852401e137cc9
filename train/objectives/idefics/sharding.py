"""Which parts of an IDEFICS are sharded as one unit."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ....models.idefics import IdeficsForVisionText2Text
from ....models.idefics.vision_towers import VisionTower
from ...parallel.sharding import Sharder


def shard_idefics(model: IdeficsForVisionText2Text, sharder: Sharder) -> None:
    """Shard an IDEFICS: decoder layers, gated blocks but for their gates, image encoder, resampler, tables."""
    decoder = model.model
    for layer in decoder.layers:
        sharder.block(layer)
    for block in decoder.gated_cross_attn_layers:
        sharder.block(block, whole=[block.alpha_cross_attn, block.alpha_dense])  # type: ignore[list-item]
    if decoder.config.use_resampler:
        resampler = decoder.perceiver_resampler
        sharder.block(resampler, whole=[resampler.latents])
    vision = decoder.vision_model
    if any(parameter.requires_grad for parameter in vision.parameters()):
        sharder.tower(vision)
    else:
        _shard_frozen_tower(vision, decoder, sharder)
    if decoder.config.tie_word_embeddings:
        sharder.exact(decoder.embed_tokens, model.lm_head)
    else:
        sharder.exact(decoder.embed_tokens)
        sharder.block(model.lm_head)


def _shard_frozen_tower(vision: VisionTower, decoder: nn.Module, sharder: Sharder) -> None:
    """One unit, gathered once a forward pass of the decoder and freed when its first gated block begins.

    A frozen encoder takes its images in portions, as many as this rank's batch needs. Ranks have different numbers
    of them, so the portions themselves must not wait for one another.
    """
    sharder.exact(vision)
    assert isinstance(vision, FSDPModule)
    vision.set_reshard_after_forward(False)
    tower: FSDPModule = vision
    decoder.register_forward_pre_hook(lambda *_: _gather(tower))
    first = decoder.gated_cross_attn_layers[0]  # type: ignore[index]
    assert isinstance(first, nn.Module)
    first.register_forward_pre_hook(lambda *_: tower.reshard())


def _gather(module: FSDPModule) -> None:
    module.unshard()
