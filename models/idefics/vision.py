"""The image encoder: CLIP's vision transformer (Radford et al. 2021), as IDEFICS uses it.

The language model reads ``last_hidden_state`` with its class token and *without* ``post_layernorm``, which
serves the pooled output alone; the parameter of the first norm is spelt ``pre_layrnorm`` in every released
file. Other vision transformers (:mod:`.towers`) are made of the same parts and say where they differ.

Legend: N images, P patches, S tokens (P and those before them), E embed_dim, H heads, D head dim.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..noise import Noise
from ..outputs import BaseModelOutputWithPooling
from .attention import attend
from .layers import activation
from .towers.configuration import IdeficsVisionConfig

_LONGEST = 100.0  # longest period of sine positions over the shortest


class IdeficsVisionEmbeddings(nn.Module):
    """Patches, the class token if there is one, and positions: [N, 3, height, width] -> [N, S, E].

    ``any_size`` takes images of other sizes without being asked to.
    """

    any_size: ClassVar[bool] = False

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.num_channels = config.num_channels
        self.grid, self.prefix = config.position_grid, config.prefix_tokens
        if self.prefix:
            self.class_embedding = nn.Parameter(torch.empty(config.embed_dim))
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.embed_dim,
            config.patch_size,
            config.patch_size,
            bias=config.patch_bias,
        )
        self.position_embedding = nn.Embedding(self.grid**2 + self.prefix, config.embed_dim)

    def positions(self, height: int, width: int) -> Tensor:
        """Position table for an image of this many pixels, interpolated from the trained grid: class token, patches."""
        table = self.position_embedding.weight
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows == columns == self.grid and height == width:
            return table
        square = table[self.prefix :].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        fine = self.interpolate(square.float(), rows, columns)
        if fine.shape[-2:] != (rows, columns):
            raise ValueError(
                f"An image of {height} × {width} pixels has {rows} × {columns} patches, but its positions "
                f"came out as {fine.shape[-2]} × {fine.shape[-1]}; resize it to a multiple of "
                f"{self.patch_size} pixels."
            )
        return torch.cat((table[: self.prefix], fine.to(table.dtype).permute(0, 2, 3, 1).flatten(0, 2)))

    def interpolate(self, square: Tensor, rows: int, columns: int) -> Tensor:
        """Positions float32 [1, E, grid, grid] -> [1, E, rows, columns], bicubic as DINO does it."""
        # The factor, not the size, decides where the samples lie; a tenth of a patch guards against rounding
        # down.
        factor = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        return F.interpolate(square, scale_factor=factor, mode="bicubic", align_corners=False)

    @torch.no_grad()
    def set_sine_positions(self) -> None:
        """Give the patches' positions sines and cosines of column and row, of periods from 2 pi to 200 pi patches."""
        width = self.position_embedding.embedding_dim // 4
        frequency = _LONGEST ** -(torch.arange(width) / width)
        table = self.position_embedding.weight
        place = torch.arange(self.grid, dtype=torch.float32).outer(frequency)
        waves = torch.cat((place.sin(), place.cos()), 1)  # [grid, E / 2]
        columns, rows = waves.repeat(self.grid, 1), waves.repeat_interleave(self.grid, 0)
        table[self.prefix :] = torch.cat((columns, rows), 1).to(table)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values of the encoder have shape {tuple(pixel_values.shape)}; give [images, "
                f"{self.num_channels}, height, width]."
            )
        height, width = pixel_values.shape[-2:]
        fits = (height, width) == (self.image_size, self.image_size)
        if not (fits or interpolate_pos_encoding or self.any_size):
            raise ValueError(
                f"Images are {height} × {width} pixels but the model was built for {self.image_size} × "
                f"{self.image_size}; resize them or pass interpolate_pos_encoding=True."
            )
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"Images of {height} × {width} pixels are smaller than one patch of {self.patch_size}; "
                "enlarge them."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        if self.prefix:
            patches = torch.cat((self.class_embedding.expand(len(patches), 1, -1), patches), dim=1)
        return patches + self.positions(height, width)


class IdeficsVisionAttention(nn.Module):
    """Full self-attention among the S tokens of an image."""

    def __init__(self, config: IdeficsVisionConfig, index: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.embed_dim // config.num_attention_heads
        self.dropout = config.attention_dropout
        self.site = f"vision.{index}.attention"
        self.k_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.v_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.q_proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.out_proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(
        self, x: Tensor, noise: Noise | None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            projection(x).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        p = self.dropout if self.training else 0.0
        out, weights = attend(query, key, value, dropout=p, noise=noise, site=self.site, weights=want_weights)
        return self.out_proj(out.transpose(1, 2).reshape(x.shape)), weights


class IdeficsVisionMLP(nn.Module):
    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class IdeficsVisionEncoderLayer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: IdeficsVisionConfig, index: int) -> None:
        super().__init__()
        self.self_attn = IdeficsVisionAttention(config, index)
        self.layer_norm1 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.mlp = IdeficsVisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    def forward(
        self, x: Tensor, noise: Noise | None = None, want_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        update, weights = self.self_attn(self.layer_norm1(x), noise, want_weights)
        x = x + update
        return x + self.mlp(self.layer_norm2(x)), weights


class IdeficsVisionEncoder(nn.Module):
    def __init__(
        self, config: IdeficsVisionConfig, layer: type[IdeficsVisionEncoderLayer] = IdeficsVisionEncoderLayer
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))


class IdeficsVisionTransformer(nn.Module):
    """Images [N, 3, height, width] to tokens [N, S, E].

    Other towers derive from it: ``pre_norm`` puts a norm before the layers, ``normed_output`` gives
    ``last_hidden_state`` after ``post_layernorm``.
    """

    embeddings_class: ClassVar[type[IdeficsVisionEmbeddings]] = IdeficsVisionEmbeddings
    layer_class: ClassVar[type[IdeficsVisionEncoderLayer]] = IdeficsVisionEncoderLayer
    pre_norm: ClassVar[bool] = True
    normed_output: ClassVar[bool] = False

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embeddings = self.embeddings_class(config)
        if self.pre_norm:
            self.pre_layrnorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.encoder = IdeficsVisionEncoder(config, self.layer_class)
        self.post_layernorm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the pixels and the residual stream: that of the norms, which stays where frozen matrices change
        theirs.
        """
        return self.post_layernorm.weight.dtype

    def blocks(self) -> list[nn.Module]:
        """The modules that run one after another: units of sharding and of recomputation."""
        return list(self.encoder.layers)

    def tables(self) -> list[nn.Module]:
        """What holds weights beside the blocks."""
        return [self.embeddings]

    def pool(self, x: Tensor) -> Tensor:
        """Tokens [N, S, E] to one vector an image [N, E]: the class token."""
        return x[:, 0]

    def reset_parameters(self) -> None:
        """CLIP's initialisation, with residual branches scaled down by depth."""
        config = self.config
        deviation = config.initializer_range * config.initializer_factor
        branch = deviation / math.sqrt(2 * config.num_hidden_layers)
        if config.prefix_tokens:
            nn.init.normal_(
                self.embeddings.class_embedding, std=config.embed_dim**-0.5 * config.initializer_factor
            )
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                scaled = name.endswith(("out_proj", "fc2", "down_proj"))
                nn.init.normal_(module.weight, std=branch if scaled else deviation)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if config.position_init == "sincos":
            self.embeddings.set_sine_positions()

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        noise: Noise | None = None,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Returns:
            ``last_hidden_state`` [N, S, E] before ``post_layernorm`` (after it with ``normed_output``),
            ``pooler_output`` [N, E] after it.

        Raises:
            ValueError: the images are not of the model's size and ``interpolate_pos_encoding`` is off.
        """
        want_weights = self.config.output_attentions if output_attentions is None else output_attentions
        want_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        x = self.embeddings(pixel_values, interpolate_pos_encoding)
        if self.pre_norm:
            x = self.pre_layrnorm(x)
        states, attentions = [x], []
        for layer in self.encoder.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, weights = checkpoint(layer, x, noise, want_weights, use_reentrant=False)  # pyright: ignore
            else:
                x, weights = layer(x, noise, want_weights)
            if want_states:
                states.append(x)
            attentions.append(weights)
        if self.normed_output:
            x = self.post_layernorm(x)
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pool(x) if self.normed_output else self.post_layernorm(self.pool(x)),
            hidden_states=tuple(states) if want_states else None,
            attentions=tuple(attentions) if want_weights else None,
        )
