"""IDEFICS's objective: the next token of packed, interleaved documents.

Laurençon et al., "OBELICS", NeurIPS 2023, section 5. The loss of a step is the mean over the real tokens of the
*global* batch, whatever ranks and micro-batches they fall into: sums are divided by one count that is known
before the first backward pass, so accumulating equals the one big batch.

B sequences, T tokens, N images a sequence.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....models.idefics import IdeficsForVisionText2Text, IdeficsProcessor
from ....models.idefics.adapters import in_one_dtype, merge_saved_adapters
from ....models.idefics.causal_lm import predicted_tokens, without_tokens
from ....models.noise import Noise
from ...checkpointing.adapter_folder import AdapterExport
from ...checkpointing.files_beside import files_beside
from ...checkpointing.frozen_base import FrozenBase
from ...checkpointing.load import load_pretrained, take_weights
from ...parallel.ranks import ranks
from ...parallel.sharding import Sharder, reduce_unused
from ..randomness import initialisation_seed
from ..training_step import TrainingModule
from .composed import composition_of
from .config import IdeficsTrainConfig
from .feature_cache import FeatureCache
from .flops import idefics_flops, peak_flops
from .lora import adapter_settings, add_adapters, merged_state_dict
from .quantization import merged_from_quantized, quantize_frozen
from .sharding import shard_idefics

FREEZE_FLAGS = (
    "freeze_text_layers",
    "freeze_text_module_exceptions",
    "freeze_lm_head",
    "freeze_vision_layers",
    "freeze_vision_module_exceptions",
)


class StepCounts(NamedTuple):
    """What one step holds, over all ranks; scalars.

    Attributes:
        predicted: labels that count.
        tokens: real tokens.
        places: tokens with padding.
        images: real images.
        pairs: what self-attention compares, tokens with those before them and themselves.
        looks: what cross-attention compares, tokens with images.
        near: of the pairs, those within the window of layers that have one.
    """

    predicted: Tensor
    tokens: Tensor
    places: Tensor
    images: Tensor
    pairs: Tensor
    looks: Tensor
    near: Tensor


class IdeficsModule(TrainingModule):
    """Trains an :class:`IdeficsForVisionText2Text`.

    Args:
        config: the group ``model`` of the run.
        processor: exported with the model; knows the image tokens.
        sources: names of the data's sources, for their losses.
        shared: the arguments of :class:`TrainingModule`.
    """

    model: IdeficsForVisionText2Text
    image_tokens: Tensor

    def __init__(
        self, config: IdeficsTrainConfig, processor: IdeficsProcessor, sources: list[str], **shared: Any
    ) -> None:
        super().__init__(build_model(config, shared["seed"]), **shared)
        self.config, self.processor, self.sources = config, processor, sources
        self.base = FrozenBase.of(self.model, config.init_checkpoint)
        tokenizer = processor.tokenizer
        image = tokenizer.require("<image>")
        around = tokenizer.require("<fake_token_around_image>")
        if max(image, around) >= self.model.config.total_vocab_size:
            raise ValueError(
                f"the tokenizer's <image> has id {image} but the model has "
                f"{self.model.config.total_vocab_size} tokens; set vocab_size and additional_vocab_size in "
                "model.config to those of the tokenizer."
            )
        self.register_buffer("image_tokens", torch.tensor([image, around]), persistent=False)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        if self.trainer_config.compile:
            self.model.model.vision_model.compile()
        self.features = FeatureCache(config.feature_cache, self.model) if config.feature_cache else None
        self._clock: float | None = None
        self._trains = {
            f"{part}_trains": any(parameter.requires_grad for parameter in module.parameters())
            for part, module in (
                ("text", self.model.model.layers),
                ("vision", self.model.model.vision_model),
                ("head", self.model.lm_head),
            )
        }

    def description(self) -> dict[str, Any]:
        lora = self.config.lora
        return {
            "family": "idefics",
            "config": self.model.config.to_dict(),
            "processor": files_beside(self.model, self.processor),
            "lora_scale": lora.alpha / lora.rank if lora.rank else None,
        }

    def export_state_dict(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The model's weights as its own checkpoints name them, adapters merged in, all of one type."""
        scale = self.description()["lora_scale"]
        if self.base is not None:
            return merged_from_quantized(self.model, weights or self.model.state_dict(), scale)
        if weights is None:
            return in_one_dtype(merged_state_dict(self.model))
        return in_one_dtype(merge_saved_adapters(weights, scale, "the trained model"))

    def export_adapters(self, weights: dict[str, Tensor] | None = None) -> AdapterExport | None:
        lora = self.config.lora
        if lora.export != "adapters":
            return None
        assert self.config.init_checkpoint is not None
        return AdapterExport(
            weights=self.model.state_dict() if weights is None else weights,
            settings=adapter_settings(self.model, lora),
            source=self.config.init_checkpoint,
            model=self.model,
            base=self.base,
        )

    def backward_step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        labels = self.labels(batch)
        predicted = predicted_tokens(labels, None, batch["document_ids"])
        real = (batch["document_ids"] >= 0).sum()
        scored = (batch["position_ids"] + 1)[batch["document_ids"] >= 0]
        own = StepCounts(
            predicted=predicted.sum(),
            tokens=real,
            places=torch.tensor(labels.numel(), device=real.device),
            images=batch["image_valid"].sum(),
            pairs=scored.sum(),
            looks=batch["image_attention_mask"].sum(),
            near=scored.clamp(min=0, max=self.model.config.sliding_window).sum(),
        )
        counts = StepCounts(*_summed(torch.stack(own).double()))
        _, world_size = ranks()
        first = int(batch["positions"][0])
        sources = len(self.sources)
        sums = torch.zeros(2 + 2 * sources, dtype=torch.float64, device=labels.device)
        # Gradients are averaged over ranks afterwards: dividing by the mean count makes that the global mean.
        divisor = counts.predicted / world_size
        for rows in self.micro_batches(len(labels)):
            part = self.crop_images({name: batch[name][rows] for name in _INPUTS})
            if self.features is not None:
                seen = part["image_attention_mask"].any(1)
                part["image_encoder_embeddings"] = self.features(part.pop("pixel_values"), seen)
            loss, nll, z_loss, group_losses = self.losses(
                part,
                labels[rows],
                divisor,
                batch["source_ids"][rows] if sources > 1 else None,
                self.noise(step, first + rows.start),
            )
            self.reduce_gradients(rows.stop == len(labels))
            self.manual_backward(loss)
            sums[0] += nll
            sums[1] += 0.0 if z_loss is None else z_loss * divisor
            if group_losses is not None:
                by_source = torch.zeros(2, sources, dtype=torch.float64, device=labels.device)
                by_source[:, : group_losses.shape[1]] = group_losses
                sums[2:] += by_source.flatten()
        self._complete_gradients()
        self.nothing_to_learn = bool(counts.predicted == 0)
        sums = _summed(sums)
        return self._metrics(sums, counts)

    def losses(
        self,
        inputs: dict[str, Tensor],
        labels: Tensor,
        divisor: Tensor,
        source_ids: Tensor | None,
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of a micro-batch: the loss to differentiate (over ``divisor`` tokens), the summed negative log-likelihood,
        the z-loss's part, and [2, sources] sums and tokens of each source.
        """
        output = self.model(
            **inputs,
            labels=labels,
            z_loss=self.config.z_loss,
            z_loss_exclude=self.image_tokens[:1],
            num_items_in_batch=divisor,
            loss_groups=source_ids,
            noise=noise,
        )
        return output.loss, output.loss_sum, output.z_loss, output.group_losses

    def shard(self, sharder: Sharder) -> None:
        shard_idefics(self.model, sharder)
        sharder.root(self, ["losses"])
        reduce_unused(self)

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """Labels int64 [B, T] of a batch; image tokens masked where they are not to be predicted."""
        return without_tokens(
            batch["labels"], None if self.config.predict_image_tokens else self.image_tokens
        )

    @staticmethod
    def crop_images(part: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out image slots that no row of a micro-batch uses, but one: it keeps the modules the same."""
        used = part["image_attention_mask"].flatten(0, 1).any(0)
        count = max(1, int(used.nonzero().max()) + 1 if bool(used.any()) else 1)
        part["pixel_values"] = part["pixel_values"][:, :count]
        part["image_attention_mask"] = part["image_attention_mask"][..., :count]
        return part

    def _complete_gradients(self) -> None:
        """Give every trained parameter a gradient, so that ranks whose batch had no image agree with others."""
        if ranks()[1] == 1:
            return
        for parameter in self.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _metrics(self, sums: Tensor, counts: StepCounts) -> dict[str, Tensor]:
        tokens, real, images = counts.predicted, counts.tokens, counts.images
        # The step before has ended on the device once its loss is read: time between reads is time of steps.
        now, before = time.perf_counter(), self._clock
        self._clock = now
        metrics = {
            "loss": sums[0] / tokens.clamp(min=1) + sums[1] / tokens.clamp(min=1),
            "nll": sums[0] / tokens.clamp(min=1),
            "tokens": tokens,
            "padding": 1 - real / counts.places,
            "images_per_1k_tokens": 1000 * images / real.clamp(min=1),
        }
        if self.config.z_loss:
            metrics["z_loss"] = sums[1] / tokens.clamp(min=1)
        if before is not None:
            metrics["tokens_per_second"] = real / (now - before)
            metrics["images_per_second"] = images / (now - before)
            flops = idefics_flops(
                self.model.config,
                tokens=real,
                images=images,
                predicted=tokens,
                pairs=counts.pairs,
                looks=counts.looks,
                near=counts.near,
            ).training(**self._trains)
            rate = torch.as_tensor(flops) / (now - before) / ranks()[1]
            metrics["tflops"] = rate / 1e12
            if (peak := peak_flops(self.device)) is not None:
                metrics["mfu"] = rate / peak
        if len(self.sources) > 1:
            by_source = sums[2:].view(2, -1)
            for number, name in enumerate(self.sources):
                if by_source[1, number]:
                    metrics[f"loss/{name}"] = by_source[0, number] / by_source[1, number]
        interval = self.model.config.cross_layer_interval
        for number, block in enumerate(self.model.model.gated_cross_attn_layers):
            layer = number * interval
            for part, alpha in (("attention", block.alpha_cross_attn), ("mlp", block.alpha_dense)):
                assert isinstance(alpha, Tensor)
                metrics[f"gate/{part}_{layer}"] = alpha.detach().float().tanh().abs().mean()
        return {name: value.float() for name, value in metrics.items()}


_INPUTS = ("input_ids", "document_ids", "position_ids", "pixel_values", "image_attention_mask")


def _summed(values: Tensor) -> Tensor:
    """Sum over ranks."""
    if ranks()[1] > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def build_model(config: IdeficsTrainConfig, seed: int) -> IdeficsForVisionText2Text:
    """The model, its weights drawn from the run's seed, read from ``init_checkpoint``, or composed of ``init_text`` and
    ``init_vision``; frozen as told.

    Raises:
        ValueError: ``init_checkpoint`` or a source holds another model or one of another shape.
    """
    wanted = config.model_config()
    if config.init_text is not None or config.init_vision is not None:
        composed = composition_of(config, seed=initialisation_seed(seed))
        for name, value in composed.config.kept().items():
            setattr(wanted, name, value)
        composed.config = wanted
        model = composed.model(torch.float32)
    elif config.init_checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(initialisation_seed(seed))
            model = IdeficsForVisionText2Text(wanted)
    else:
        loaded, _ = load_pretrained(
            config.init_checkpoint, dtype="float32", family="idefics", processor=False
        )
        with torch.device("meta"):
            model = IdeficsForVisionText2Text(wanted)
        take_weights(model, loaded, config.init_checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(initialisation_seed(seed))  # adapters are drawn, too
        prepare(model, config)
    return model.train()


def prepare(model: IdeficsForVisionText2Text, config: IdeficsTrainConfig) -> None:
    """Freeze what does not train, put adapters in, and store frozen matrices as ``quantize`` and ``frozen_dtype`` say.

    Raises:
        ValueError: there is nothing to quantise, or it cannot be.
    """
    freeze(model)
    if config.freeze_cross_attention:
        for block in model.model.gated_cross_attn_layers:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.requires_grad_(False)
    if config.lora.rank:
        add_adapters(model, config.lora)
    if config.storage is not None:
        quantize_frozen(model, config.storage, config.quantization.skip)
    if config.frozen_dtype != "float32":
        for module in model.modules():
            # Only matrices that autocast converts anyway: norms and embeddings keep the residual in float32.
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(getattr(torch, config.frozen_dtype))


def freeze(model: IdeficsForVisionText2Text) -> None:
    """Train what the model configuration's freeze flags leave trainable, nothing else."""
    config = model.config
    model.requires_grad_(True)
    if config.freeze_text_layers:
        model.model.freeze_text_layers(config.freeze_text_module_exceptions)
    if config.freeze_vision_layers:
        model.model.freeze_vision_layers(config.freeze_vision_module_exceptions)
    if config.freeze_lm_head:
        model.lm_head.weight.requires_grad_(False)
