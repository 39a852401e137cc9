"""Low-rank adapters through ``peft``, put into a model of ours and merged when it is exported."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ....models.groupvit.vision import GroupViTVisionTransformer
from ....models.idefics.adapters import _ADAPTER, _BASE
from ....models.idefics.cross_attention import IdeficsGatedCrossAttentionLayer
from ....models.idefics.image_context import ImageContext
from ....models.idefics.modeling import IdeficsDecoderLayer
from ....models.idefics.vision import IdeficsVisionEncoderLayer
from ....models.noise import Noise

if TYPE_CHECKING:
    from ....models.idefics import IdeficsForVisionText2Text
    from .config import LoraConfig

# Projections of the decoder layers and of the vision tower, by the names of released checkpoints.
GATED = r"model\.gated_cross_attn_layers\.\d+\.(cross_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
TEXT = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
VISION = (
    r"model\.vision_model\.encoder\.(stages\.\d+\.)?layers\.\d+\."
    r"(self_attn\.(q|k|v|out)_proj|mlp\.(fc[12]|(gate|up|down)_proj))"
)
BLOCKS = (IdeficsDecoderLayer, IdeficsGatedCrossAttentionLayer, IdeficsVisionEncoderLayer)
# Projections of a gated block that see images, not tokens.
OF_IMAGES = ("cross_attn.k_proj.", "cross_attn.v_proj.")


def add_adapters(model: IdeficsForVisionText2Text, config: LoraConfig) -> None:
    """Put adapters beside the projections, whose own weights are frozen.

    Raises:
        ValueError: ``peft`` is not installed, or dropout is asked for in a tower that draws no noise.
    """
    if (
        config.dropout
        and config.parts != "text"
        and isinstance(model.model.vision_model, GroupViTVisionTransformer)
    ):
        raise ValueError(
            f"model.lora.dropout={config.dropout} with model.lora.parts={config.parts} would drop at random in a "
            "GroupViT tower, which draws no noise; set model.lora.dropout=0, or model.lora.parts=text."
        )
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("model.lora needs the package peft; install interloom[peft].") from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    gated = not any(re.fullmatch(rf"{GATED}\.weight", name) for name in trained)
    inject_adapter_in_model(PeftConfig(**peft_settings(config, gated)), model)
    if config.dropout:
        tie_dropout_to_samples(model, config.dropout)
    # peft freezes everything but its adapters: what else was trained (gates, resampler, new tokens) still is.
    for name, parameter in model.named_parameters():
        adapted = _BASE in f"{name}."
        if name.replace(_BASE, ".") in trained and not adapted:
            parameter.requires_grad_(True)


def peft_settings(config: LoraConfig, gated: bool) -> dict[str, Any]:
    """The arguments of ``peft``'s own configuration; ``gated``: the gated blocks have adapters, too."""
    text = f"({TEXT}|{GATED})" if gated else TEXT
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": {"text": text, "vision": VISION, "both": f"({text}|{VISION})"}[config.parts],
    }


def adapter_settings(model: nn.Module, config: LoraConfig) -> dict[str, Any]:
    """:func:`peft_settings` of the adapters that are in a model."""
    gated = any(
        "gated_cross_attn_layers" in name and ".lora_" in name for name, _ in model.named_parameters()
    )
    return peft_settings(config, gated)


class AdapterDropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, sample, place in it), as all randomness of a run is.

    ``peft``'s own draws from PyTorch's generator: other numbers on every rank, and after a resume.

    Attributes:
        noise: of the forward pass; None draws from PyTorch's generator, outside a trainer.
        rows: int64 [R], which tokens or images of the run the input consists of, one after another.
    """

    def __init__(self, p: float, site: str) -> None:
        super().__init__()
        self.p, self.site = p, site
        self.noise: Noise | None = None
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.noise is None or self.rows is None:
            return F.dropout(x, self.p, self.training)
        width = x.numel() // len(self.rows)
        keep = self.noise.uniform(self.site, self.rows, width, device=x.device) >= self.p
        return x * keep.view(x.shape).to(x.dtype) / (1.0 - self.p)


def tie_dropout_to_samples(model: nn.Module, p: float) -> None:
    """Replace the dropout of the adapters in ``model`` by :class:`AdapterDropout`, fed by the blocks they are in."""
    for place, block in model.named_modules():
        if not isinstance(block, BLOCKS):
            continue
        dropouts: dict[str, AdapterDropout] = {}
        for name, module in block.named_modules():
            held = getattr(module, "lora_dropout", None)
            if isinstance(held, nn.ModuleDict):
                for adapter in held:
                    dropouts[f"{name}."] = AdapterDropout(p, f"{place}.{name}.{adapter}")
                    held[adapter] = dropouts[f"{name}."]
        if dropouts:
            block.register_forward_pre_hook(partial(_hand_over, dropouts))


def _hand_over(dropouts: dict[str, AdapterDropout], block: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Tell the adapters of a block what its forward pass is told of noise."""
    noise = next((value for value in inputs if isinstance(value, Noise)), None)
    images = next((value for value in inputs if isinstance(value, ImageContext)), None)
    for name, dropout in dropouts.items():
        dropout.noise = noise
        if noise is None:
            dropout.rows = None
        elif name.startswith(OF_IMAGES):
            dropout.rows = None if images is None else images.numbers
        else:
            dropout.rows = noise.rows if noise.tokens is None else noise.tokens


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict under its own names, each adapter added to the weight it stands beside."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    if not any(_BASE in name for name in weights):
        return weights
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "active_adapters"):
            stored = weights[f"{name}.base_layer.weight"]
            base = stored.float()  # rounded once, after all is added
            for adapter in module.active_adapters:  # type: ignore[union-attr]
                base = base + module.get_delta_weight(adapter).detach().float()  # type: ignore[operator]
            weights[f"{name}.base_layer.weight"] = base.to(stored.dtype)
    return {name.replace(_BASE, "."): value for name, value in weights.items() if not _ADAPTER.search(name)}
