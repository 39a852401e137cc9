"""What a run would need of each GPU, before anybody rents one: ``interloom train … plan_only=true``.

The model is built on the ``meta`` device, so its parameters are counted exactly without memory for them. Per GPU:

- **weights**: 4 bytes a parameter (mixed precision keeps float32 masters; frozen matrices may take 2), over
  all ranks under FSDP2;
- **gradients** 4 and **optimiser** 8 bytes a *trained* parameter (12 with ``optim.ema_decay``: the average of the
  weights), over all ranks under FSDP2;
- **gathered**: under FSDP2 the two largest blocks whole at a time, in the compute dtype;
- **activations** of one micro-batch: what backward keeps. With activation checkpointing that is one residual
  stream a block and the inside of a single block; without, the inside of all.

The inside of a block is counted tensor by tensor from the layers' shapes (:func:`_decoder_block` and so on); a
test compares the sum with the tensors that autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from .communication_plan import (
    A100,
    EFFICIENCY,
    LINK_EFFICIENCY,
    CommunicationPlan,
    StepWork,
    groupvit_work,
    idefics_work,
    plan_communication,
)
from .config import TrainConfig

GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GIB = 2**30
LOSS_CHUNK = 3 * 2**27  # logits of a chunk in float32, their gradient and the compute-dtype copy


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU of a run over ``gpus`` of them."""

    gpus: int
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, without the allocator's and CUDA's own overhead."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model: in all, trained, of its largest block, and the bytes its weights take."""

    parameters: int
    trained: int
    largest_block: int
    weight_bytes: int


def measure(model: nn.Module) -> ModelSize:
    """Count a model, best one on ``meta``."""
    parameters = list(model.parameters())
    blocks = [
        sum(p.numel() for p in module.parameters())
        for container in model.modules()
        if isinstance(container, nn.ModuleList)
        for module in container
    ]
    return ModelSize(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        max(blocks, default=0),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def plan_memory(
    size: ModelSize,
    activations: float,
    *,
    gpus: int,
    sharded: bool,
    compute_bytes: int = 2,
    averaged: bool = False,
) -> MemoryPlan:
    """Memory of one GPU.

    Args:
        size: of the model.
        activations: bytes that backward keeps of one micro-batch.
        gpus: in the run.
        sharded: FSDP2; otherwise every GPU holds the whole model.
        compute_bytes: of one number in the compute dtype.
        averaged: a moving average of the trained weights is kept.
    """
    over = gpus if sharded else 1
    gathered = 2 * size.largest_block * compute_bytes if sharded and gpus > 1 else 0
    return MemoryPlan(
        gpus,
        size.weight_bytes / over,
        4 * size.trained / over,
        (12 if averaged else 8) * size.trained / over,
        gathered,
        activations,
    )


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
    gates = config.num_hidden_layers // config.cross_layer_interval
    if checkpointing:
        text = (config.num_hidden_layers + gates) * residual + max(decoder, gated)
    else:
        text = config.num_hidden_layers * decoder + gates * gated
    vision = config.vision_config
    patches = rows * images * vision.num_tokens
    stages = [
        (
            depth,
            rows * images * places_of_image,
            _vision_block(
                vision.embed_dim, vision.intermediate_size, rows * images * places_of_image, compute_bytes
            ),
        )
        for depth, places_of_image in vision.layer_tokens
    ]
    largest = max(layer for _, _, layer in stages)
    if not vision_trains:
        seen = largest  # frozen: one layer at a time, nothing is kept
    elif checkpointing:
        seen = sum(depth * 4 * among * vision.embed_dim for depth, among, _ in stages) + largest
    else:
        seen = sum(depth * layer for depth, _, layer in stages)
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
    """Two norms' inputs (float32), normed inputs, q k v and their rotations, output, and the gated MLP."""
    width, inner = config.hidden_size, config.intermediate_size
    norms = 2 * 4 * places * width
    attention = 7 * places * width * size if trained else 5 * places * width * size
    mlp = (places * width if trained else 0) * size + 3 * places * inner * size
    return norms + attention + mlp


def _gated_block(config: IdeficsConfig, places: int, image_tokens: int, size: int) -> float:
    """Norms, queries and output over tokens, keys and values over images, updates, and the gated MLP."""
    width, inner = config.hidden_size, config.intermediate_size
    over_tokens = 2 * 4 * places * width + 7 * places * width * size + 3 * places * inner * size
    return over_tokens + 3 * image_tokens * width * size


def _vision_block(width: int, inner: int, patches: int, size: int) -> float:
    return 2 * 4 * patches * width + 7 * patches * width * size + 3 * patches * inner * size


Plans = tuple[ModelSize, list[tuple[MemoryPlan, CommunicationPlan]]]


def plan_idefics(config: TrainConfig) -> Plans:
    """The plans of an IDEFICS run on :data:`GPU_COUNTS` GPUs."""
    from .idefics import prepare

    training, data = config.model, config.data
    shape: IdeficsConfig = training.model_config()
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(shape)
    prepare(model, training)
    size = measure(model)
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
            compute_bytes=4 if config.trainer.precision == "32-true" else 2,
            text_trains=not shape.freeze_text_layers,
            vision_trains=not shape.freeze_vision_layers
            or (training.lora.parts != "text" and training.lora.rank > 0),
        )
        work = idefics_work(model, config, passes=-(-share // rows))
        plans.append(_both(config, size, activations, work, gpus))
    return size, plans


def _both(
    config: TrainConfig, size: ModelSize, activations: float, work: StepWork, gpus: int
) -> tuple[MemoryPlan, CommunicationPlan]:
    sharded = config.trainer.strategy == "fsdp2"
    compute = 4 if config.trainer.precision == "32-true" else 2
    memory = plan_memory(
        size,
        activations,
        gpus=gpus,
        sharded=sharded,
        compute_bytes=compute,
        averaged=config.optim.ema_decay is not None,
    )
    return memory, plan_communication(work, gpus=gpus, sharded=sharded, compute_bytes=compute)


def plan_groupvit(config: TrainConfig) -> Plans:
    """The plans of a GroupViT run: activations of both towers, kept for one micro-batch."""
    from ..models.groupvit import GroupViTModel

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


def print_plan(config: TrainConfig) -> None:
    """Print the table of ``plan_only=true``."""
    from rich.table import Table

    from .messages import console as new_console

    family = getattr(config.model, "family", None)
    size, plans = plan_idefics(config) if family == "idefics" else plan_groupvit(config)
    console = new_console()
    console.print(
        f"{size.parameters / 1e9:.2f} B parameters, {size.trained / 1e9:.2f} B trained; global batch "
        f"{config.data.batch_size}, micro-batch {config.trainer.micro_batch_size or 'the whole share'}, "
        f"strategy {config.trainer.strategy}, precision {config.trainer.precision}"
    )
    table = Table(
        "GPUs", "weights", "gradients", "optimiser", "gathered", "activations", "GiB each", title=None
    )
    for plan, _ in plans:
        columns: list[Any] = [
            plan.weights,
            plan.gradients,
            plan.optimizer,
            plan.gathered,
            plan.activations,
            plan.total,
        ]
        table.add_row(str(plan.gpus), *(f"{value / GIB:.2f}" for value in columns))
    console.print(table)
    console.print("Add about 1 to 2 GiB for CUDA and the allocator.")
    table = Table("GPUs", "batch each", "passes", "sends GB", "in s", "computes s", "share", "images/s")
    for _, plan in plans:
        share = config.data.batch_size // plan.gpus
        passes = -(-share // min(share, config.trainer.micro_batch_size or share))
        table.add_row(
            str(plan.gpus),
            str(share),
            str(passes),
            f"{plan.sent / 1e9:.2f}",
            f"{plan.seconds:.3g}",
            f"{plan.compute_seconds:.3g}",
            f"{plan.share:.0%}",
            f"{plan.images_per_second:,.0f}",
        )
    console.print(table)
    console.print(
        f"A step on {A100.name}, at {EFFICIENCY:.0%} of the peak and {LINK_EFFICIENCY:.0%} of the links, nothing "
        "hidden behind arithmetic. images/s is what the readers of all machines must deliver."
    )
