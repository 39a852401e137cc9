"""What an IDEFICS run would need of memory and of the network."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ....models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from ....models.idefics.quantized import quantized_layers
from ...config import TrainConfig
from ...planning.communication import StepWork, _layer_flops, _numbers
from ...planning.memory import GPU_COUNTS, ModelSize, Plans, _both, _vision_block, measure
from .quantization import quantize_frozen

LOSS_CHUNK = 3 * 2**27  # logits of a chunk in float32, their gradient and the compute-dtype copy


def idefics_activations(
    config: IdeficsConfig,
    *,
    rows: int,
    tokens: int,
    images: int,
    checkpointing: bool,
    compute_bytes: int = 2,
    text_trains: bool = True,
    vision_trains: bool = False,
) -> float:
    """Bytes that backward keeps of a micro-batch of ``rows`` sequences with ``images`` images each.

    The residual stream is float32, everything inside a block has ``compute_bytes``.
    """
    width, places = config.hidden_size, rows * tokens
    residual = 4 * places * width
    decoder = _decoder_block(config, places, compute_bytes, trained=text_trains)
    image_tokens = rows * images * _tokens_of_image(config)
    gated = _gated_block(config, places, image_tokens, compute_bytes)
    gates = config.gated_blocks
    if checkpointing:
        text = (config.num_hidden_layers + gates) * residual + max(decoder, gated)
    else:
        text = config.num_hidden_layers * decoder + gates * gated
    vision = config.vision_config
    patches = rows * images * vision.num_tokens
    stages = []  # layers, tokens they run over, what backward keeps of one
    for depth, among in vision.layer_tokens:
        over = rows * images * among
        block = _vision_block(vision.embed_dim, vision.intermediate_size, over, compute_bytes)
        stages.append((depth, over, block))
    largest = max(block for _, _, block in stages)
    if not vision_trains:
        seen = largest  # frozen: one layer at a time, nothing is kept
    elif checkpointing:
        seen = sum(depth * 4 * over * vision.embed_dim for depth, over, _ in stages) + largest
    else:
        seen = sum(depth * block for depth, _, block in stages)
    resampler = 0.0
    if config.use_resampler:
        perceiver = config.perceiver_config
        inner = perceiver.resampler_n_heads * perceiver.resampler_head_dim
        context = patches + image_tokens
        # Normed context and latents, keys, values, queries, the output, and the MLP of four times the width.
        each = (2 * context * inner + image_tokens * (3 * inner + 6 * vision.embed_dim)) * compute_bytes
        resampler = perceiver.resampler_depth * (each + 4 * context * vision.embed_dim)
    return text + seen + resampler + 2 * residual + LOSS_CHUNK


def _tokens_of_image(config: IdeficsConfig) -> int:
    if config.use_resampler:
        return config.perceiver_config.resampler_n_latents
    return config.vision_config.num_tokens


def _decoder_block(config: IdeficsConfig, places: int, size: int, *, trained: bool) -> float:
    """Two norms' inputs (float32), normed inputs, q k v and their rotations, output, and the gated MLP.

    Attention reads grouped keys and values as copies for every head, so they take as much as heads of their own.
    """
    width, inner, heads = config.hidden_size, config.intermediate_size, _heads(config)
    norms = 2 * 4 * places * width
    attention = ((width + 6 * heads) if trained else 5 * heads) * places * size
    if config.text_qk_norms:
        attention += 2 * heads * places * size
    mlp = (places * width if trained else 0) * size + 3 * places * inner * size
    return norms + attention + mlp


def _gated_block(config: IdeficsConfig, places: int, image_tokens: int, size: int) -> float:
    """Norms, queries and output over tokens, keys and values over images, updates, and the gated MLP."""
    width, inner, heads = config.hidden_size, config.intermediate_size, _heads(config)
    kept = 4 * width + 3 * heads + 3 * inner
    return 2 * 4 * places * width + kept * places * size + 3 * image_tokens * heads * size


def _heads(config: IdeficsConfig) -> int:
    """Width of all heads of queries together."""
    return config.num_attention_heads * config.head_dim


def plan_idefics(config: TrainConfig) -> Plans:
    """The plans of an IDEFICS run on :data:`GPU_COUNTS` GPUs."""
    from .objective import prepare

    training, data = config.model, config.data
    shape: IdeficsConfig = training.model_config()
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(shape)
    prepare(model, replace(training, quantize=None))
    size, compute_bytes = measure(model), 4 if config.trainer.precision == "32-true" else 2
    # Weights are counted as if all were numbers; their bytes are those of the layers as they are stored.
    gathered, dequantized = size.parameters, 0
    if training.storage is not None:
        stored = copy.deepcopy(model)
        quantize_frozen(stored, training.storage, training.quantization.skip)
        size = quantized_size(stored, size)
        layers = quantized_layers(stored).values()
        numbers = [layer.in_features * layer.out_features for layer in layers]
        packed = sum(p.nbytes for layer in layers for p in layer.parameters() if p.ndim > 1)
        gathered, dequantized = size.parameters - sum(numbers) + packed // compute_bytes, max(numbers)
    plans = []
    for gpus in GPU_COUNTS:
        if data.batch_size % gpus:
            continue
        share = data.batch_size // gpus
        rows = min(share, config.trainer.micro_batch_size or share)
        activations = idefics_activations(
            shape,
            rows=rows,
            tokens=data.max_tokens,
            images=data.max_images,
            checkpointing=training.gradient_checkpointing,
            compute_bytes=compute_bytes,
            text_trains=not shape.freeze_text_layers,
            vision_trains=not shape.freeze_vision_layers
            or (training.lora.parts != "text" and training.lora.rank > 0),
        )
        activations += dequantized * compute_bytes  # one matrix at a time, for as long as its product takes
        work = replace(idefics_work(model, config, passes=-(-share // rows)), gathered=gathered)
        plans.append(_both(config, size, activations, work, gpus))
    return size, plans


def quantized_size(stored: IdeficsForVisionText2Text, size: ModelSize) -> ModelSize:
    """The size of a model with quantised layers: ``size`` of the plain one, with the bytes that are really stored."""
    found = measure(stored)
    layers = quantized_layers(stored).values()
    blocks = [
        (
            sum(p.numel() for p in block.parameters() if p.is_floating_point()),
            sum(p.nbytes for p in block.parameters() if not p.is_floating_point()),
        )
        for container in stored.modules()
        if isinstance(container, nn.ModuleList)
        for block in container
    ]
    numbers, packed = max(blocks, key=lambda block: 2 * block[0] + block[1], default=(0, 0))
    return replace(
        size,
        largest_block=numbers,
        packed_block=packed,
        weight_bytes=found.weight_bytes,
        whole_bytes=sum(p.nbytes for layer in layers for p in layer.parameters() if p.ndim <= 1),
    )


def idefics_work(model: Any, config: TrainConfig, *, passes: int) -> StepWork:
    """One step of an IDEFICS recipe: every sequence full, ``data.max_images`` images in each."""
    data, training, shape = config.data, config.model, model.config
    decoder, vision = model.model, shape.vision_config
    places = data.batch_size * data.max_tokens
    layer = _numbers(decoder.layers) // shape.num_hidden_layers
    context = data.max_tokens / 2
    text = sum(
        _layer_flops(layer, places, min(context, shape.window_of(index) or context), _heads(shape))
        for index in range(shape.num_hidden_layers)
    )
    gated = _numbers(decoder.gated_cross_attn_layers)
    text += _layer_flops(model.lm_head.weight.numel(), places, 0, 0)
    pictures = data.batch_size * data.max_images
    seen = pictures * vision.num_tokens
    layers = _numbers(decoder.vision_model) // sum(depth for depth, _ in vision.layer_tokens)
    images = sum(
        depth * _layer_flops(layers, pictures * among, among, vision.embed_dim)
        for depth, among in vision.layer_tokens
    )
    if shape.use_resampler:
        images += _layer_flops(_numbers(decoder.perceiver_resampler), seen, 0, 0)
    vision_trains = not shape.freeze_vision_layers
    # Backward costs one forward for the activations and one for the weights, where they train.
    again = 1 if training.gradient_checkpointing else 0
    text *= 1 + again + (2 if not shape.freeze_text_layers else 1)
    text += (3 + again) * _layer_flops(gated, places, 0, 0)
    images *= 1 + (again + 2 if vision_trains else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return StepWork(text + images, trained, _numbers(model), passes, 0, 0, data.batch_size * data.max_images)
