"""DINOv2's image tower (Oquab et al. 2023), with registers or without (Darcet et al. 2024).

A pre-norm vision transformer with a learnt scale a channel on both residual branches of a layer, read after its last
norm. Registers stand between the class token and the patches and have no position. Images may have any size:
positions are interpolated from those that were learnt (on 518 pixels, while released processors make 224).

Legend: N images, S tokens of an image, R registers, E embed_dim.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...noise import Noise
from ..vision import IdeficsVisionEmbeddings, IdeficsVisionEncoderLayer, IdeficsVisionTransformer
from .configuration import IdeficsDinov2Config, IdeficsDinov2WithRegistersConfig


class IdeficsDinov2Embeddings(IdeficsVisionEmbeddings):
    """Class token, registers, patches: [N, 3, height, width] -> [N, S, E]."""

    any_size: ClassVar[bool] = True

    def __init__(self, config: IdeficsDinov2Config) -> None:
        super().__init__(config)
        self.antialias = config.antialias
        self.registers = 0
        if isinstance(config, IdeficsDinov2WithRegistersConfig):
            self.registers = config.num_register_tokens
            self.register_tokens = nn.Parameter(torch.empty(self.registers, config.embed_dim))

    def interpolate(self, square: Tensor, rows: int, columns: int) -> Tensor:
        return F.interpolate(
            square, size=(rows, columns), mode="bicubic", align_corners=False, antialias=self.antialias
        )

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        x = super().forward(pixel_values, interpolate_pos_encoding)
        if not self.registers:
            return x
        registers = self.register_tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)


class IdeficsLayerScale(nn.Module):
    """x [..., E] times a learnt number a channel."""

    def __init__(self, config: IdeficsDinov2Config) -> None:
        super().__init__()
        self.start = config.layerscale_value
        self.lambda1 = nn.Parameter(torch.empty(config.embed_dim))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.lambda1, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class IdeficsDinov2GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with biases: the MLP of the giant model."""

    def __init__(self, config: IdeficsDinov2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.embed_dim, config.intermediate_size)
        self.up_proj = nn.Linear(config.embed_dim, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class IdeficsDinov2Layer(IdeficsVisionEncoderLayer):
    """Pre-norm block with scaled branches."""

    def __init__(self, config: IdeficsDinov2Config, index: int) -> None:
        super().__init__(config, index)
        if config.use_swiglu_ffn:
            self.mlp = IdeficsDinov2GatedMLP(config)
        self.layer_scale1, self.layer_scale2 = IdeficsLayerScale(config), IdeficsLayerScale(config)

    def forward(
        self, x: Tensor, noise: Noise | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        update, weights = self.self_attn(self.layer_norm1(x), noise, want_weights)
        x = x + self.layer_scale1(update)
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x))), weights


class IdeficsDinov2Transformer(IdeficsVisionTransformer):
    """Images [N, 3, height, width] of any size to class token, registers and patches [N, S, E]."""

    embeddings_class: ClassVar[type[IdeficsVisionEmbeddings]] = IdeficsDinov2Embeddings
    layer_class: ClassVar[type[IdeficsVisionEncoderLayer]] = IdeficsDinov2Layer
    pre_norm: ClassVar[bool] = False
    normed_output: ClassVar[bool] = True

    def reset_parameters(self) -> None:
        """As CLIP's, registers like its class token, scales at ``layerscale_value``."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, IdeficsLayerScale):
                module.reset_parameters()
        if self.embeddings.registers:
            nn.init.normal_(self.embeddings.register_tokens, std=self.config.initializer_range)  # pyright: ignore
