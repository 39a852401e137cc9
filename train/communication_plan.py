"""What a step of a run would send and compute on each GPU: the other half of ``plan_only=true``.

Counted, per GPU and optimiser step (n GPUs, a ring sends (n - 1) / n of a tensor in an all-gather or reduce-scatter
and twice that in an all-reduce; Rabenseifner's bound, which NCCL's rings and trees meet):

- **ddp**: one all-reduce of float32 gradients, whatever the micro-batches;
- **fsdp2**: in every pass, weights gathered for forward and again for backward in the compute dtype, and gradients
  reduce-scattered in float32;
- **contrastive objective**: features of the global batch gathered forward, their gradients summed backward.

Up to 8 GPUs talk over NVLink; beyond, a ring enters and leaves each machine, whose network cards share its bytes.
Times are bytes over bandwidth and FLOPs over the tensor cores' peak at :data:`EFFICIENCY`, so they are estimates: a
run of one GPU and one of two machines should replace them before a cluster is booked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .config import TrainConfig

GPUS_PER_MACHINE = 8
# Of the peaks: what large matrix products and large NCCL messages usually reach.
EFFICIENCY, LINK_EFFICIENCY = 0.4, 0.8


@dataclass(frozen=True)
class Hardware:
    """One kind of machine: bytes a second in one direction, of one GPU's NVLink and of all its network cards."""

    name: str
    flops: float
    nvlink: float
    network: float


A100 = Hardware("A100 80GB, NVLink 3, 8 × HDR InfiniBand", 312e12, 300e9, 200e9)
H100 = Hardware("H100 80GB, NVLink 4, 8 × NDR InfiniBand", 989e12, 450e9, 400e9)


@dataclass(frozen=True)
class StepWork:
    """What a recipe does in one optimiser step, over all GPUs or of one model.

    Attributes:
        flops: of the whole step on the global batch, recomputation included.
        trained, gathered: parameters that train, and that FSDP2 gathers.
        passes: forward passes of the encoders with gradients, per optimiser step (micro-batches).
        extra_forwards: forward passes without, which gather too (contrastive accumulation).
        features: numbers of the contrastive features of the global batch.
        images: of the global batch.
    """

    flops: float
    trained: int
    gathered: int
    passes: int
    extra_forwards: int
    features: int
    images: int


@dataclass(frozen=True)
class CommunicationPlan:
    """Bytes that one GPU sends in a step, and the seconds that they and the arithmetic take."""

    gpus: int
    sent: float
    seconds: float
    compute_seconds: float
    images_per_second: float

    @property
    def share(self) -> float:
        """Of a step, if nothing of it is hidden behind arithmetic."""
        return self.seconds / (self.seconds + self.compute_seconds)


def plan_communication(
    work: StepWork, *, gpus: int, sharded: bool, compute_bytes: int, hardware: Hardware = A100
) -> CommunicationPlan:
    """Communication of one GPU of ``gpus``."""
    around = (gpus - 1) / gpus
    if sharded:
        gathers = 2 * work.passes + work.extra_forwards
        sent = around * (gathers * work.gathered * compute_bytes + work.passes * work.trained * 4)
    else:
        sent = 2 * around * work.trained * 4
    sent += 2 * around * work.features * 4
    several = gpus > GPUS_PER_MACHINE
    # A ring crosses into each machine once: all its cards carry what one GPU's links carry inside.
    bandwidth = min(hardware.nvlink, hardware.network) if several else hardware.nvlink
    compute = work.flops / gpus / (hardware.flops * EFFICIENCY)
    seconds = sent / (bandwidth * LINK_EFFICIENCY)
    return CommunicationPlan(gpus, sent, seconds, compute, work.images / (compute + seconds))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_flops(parameters: int, places: float, context: float, width: int) -> float:
    """Forward pass of a layer: two for every weight and place, and both products of attention."""
    return places * (2 * parameters + 4 * context * width)


def idefics_work(model: Any, config: TrainConfig, *, passes: int) -> StepWork:
    """One step of an IDEFICS recipe: every sequence full, ``data.max_images`` images in each."""
    data, training, shape = config.data, config.model, model.config
    decoder, vision = model.model, shape.vision_config
    places = data.batch_size * data.max_tokens
    layer = _numbers(decoder.layers) // shape.num_hidden_layers
    text = shape.num_hidden_layers * _layer_flops(layer, places, data.max_tokens / 2, shape.hidden_size)
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
