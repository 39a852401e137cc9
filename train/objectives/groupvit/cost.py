"""What a GroupViT run would need of memory and of the network."""

from __future__ import annotations

from typing import Any

import torch

from ...config import TrainConfig
from ...planning.communication import StepWork, _layer_flops, _numbers
from ...planning.memory import GPU_COUNTS, Plans, _both, _vision_block, measure


def plan_groupvit(config: TrainConfig) -> Plans:
    """The plans of a GroupViT run: activations of both towers, kept for one micro-batch."""
    from ....models.groupvit import GroupViTModel

    shape = config.model.model_config()
    with torch.device("meta"):
        model = GroupViTModel(shape)
    size = measure(model)
    vision, text = shape.vision_config, shape.text_config
    patches = (config.data.image_size // vision.patch_size) ** 2
    compute = 4 if config.trainer.precision == "32-true" else 2
    plans = []
    for gpus in GPU_COUNTS:
        if config.data.batch_size % gpus:
            continue
        share = config.data.batch_size // gpus
        rows = min(share, config.trainer.micro_batch_size or share)
        kept, places = 0.0, patches
        for stage, depth in enumerate(vision.depths):
            places_here = rows * (places + vision.num_group_tokens[stage])
            kept += depth * _vision_block(vision.hidden_size, vision.intermediate_size, places_here, compute)
            if stage < len(vision.num_output_groups):
                places = vision.num_output_groups[stage]
        # Captions and prompts are packed; 16 tokens on average.
        words = rows * (1 + config.model.multi_label) * 16
        kept += text.num_hidden_layers * _vision_block(
            text.hidden_size, text.intermediate_size, words, compute
        )
        work = groupvit_work(
            model, config, passes=-(-share // rows), words=words * config.data.batch_size / rows
        )
        plans.append(_both(config, size, kept, work, gpus))
    return size, plans


def groupvit_work(model: Any, config: TrainConfig, *, passes: int, words: float) -> StepWork:
    """One step of a GroupViT recipe; ``words`` tokens of text in the global batch."""
    data, shape = config.data, model.config
    vision, text = shape.vision_config, shape.text_config
    places, flops = (data.image_size // vision.patch_size) ** 2, 0.0
    for number, (stage, depth) in enumerate(
        zip(model.vision_model.encoder.stages, vision.depths, strict=True)
    ):
        context = places + vision.num_group_tokens[number]
        if depth:
            layer = _numbers(stage.layers) // depth
            flops += depth * _layer_flops(layer, data.batch_size * context, context, vision.hidden_size)
        if number < len(vision.num_output_groups):
            places = vision.num_output_groups[number]
    layer = _numbers(model.text_model.encoder) // text.num_hidden_layers
    flops += text.num_hidden_layers * _layer_flops(layer, words, 16, text.hidden_size)
    first = (
        passes if passes > 1 else 0
    )  # the features of the whole batch are found before any is differentiated
    flops *= 4 if first else 3
    features = data.batch_size * (2 + config.model.multi_label) * shape.projection_dim
    size = _numbers(model)
    return StepWork(flops, size, size, passes, first, features, data.batch_size)
