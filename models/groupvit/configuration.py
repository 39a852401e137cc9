"""Configuration of GroupViT: the names and defaults users know from Transformers, plus options of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar, Self

from ..configuration import ModelConfig, configuration
from ..foreign_settings import Fixed

# What both towers are, by the names that relatives give such settings: every projection has a bias, no head is shared.
TOWER: Fixed = {
    "attention_bias": lambda tower: (True,),
    "mlp_bias": lambda tower: (True,),
    "qkv_bias": lambda tower: (True,),
    "num_key_value_heads": lambda tower: (tower.num_attention_heads,),
    "head_dim": lambda tower: (tower.hidden_size // tower.num_attention_heads,),
    "hidden_activation": lambda tower: (tower.hidden_act,),
    "activation_function": lambda tower: (tower.hidden_act,),
    "hidden_dropout": lambda tower: (tower.dropout,),
    "hidden_dropout_prob": lambda tower: (tower.dropout,),
    "attention_probs_dropout_prob": lambda tower: (tower.attention_dropout,),
    "position_embedding_type": lambda tower: ("absolute",),
    "is_decoder": lambda tower: (False,),
    "add_cross_attention": lambda tower: (False,),
}


class GroupViTTowerConfig(ModelConfig):
    """Base of the towers' configurations, which are read from a whole model's file as well."""

    whole_key: ClassVar[str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        if values.get("model_type") == GroupViTConfig.model_type:
            return getattr(GroupViTConfig.from_dict(values), cls.whole_key)
        return super().from_dict(values)


@configuration
class GroupViTTextConfig(GroupViTTowerConfig):
    """Causal text tower. ``eos_token_id=2`` is the old rule: pool where the token id is highest.

    ``hidden_act``, here and in the vision tower, is a name or a function of a tensor.
    """

    model_type: ClassVar[str] = "groupvit_text_model"
    whole_key: ClassVar[str] = "text_config"
    fixed: ClassVar[Fixed] = TOWER

    vocab_size: int = 49408
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    max_position_embeddings: int = 77
    hidden_act: Any = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_heads(self.hidden_size, self.num_attention_heads, "text")
        if isinstance(self.eos_token_id, Sequence):
            self.eos_token_id = self.eos_token_id[0]


@configuration
class GroupViTVisionConfig(GroupViTTowerConfig):
    """Vision tower: stages of transformer layers, each but the last ending in a grouping block.

    Args:
        depths: transformer layers of each stage; 0 is allowed.
        num_group_tokens: learned group tokens of each stage, 0 for a stage that does not group.
        num_output_groups: groups that each stage leaves.
        image_size, patch_size: pixels, one number or [height, width].
        assign_eps: added to a group's total assignment before the division (1.0 in the original: 1e-10 is
            unstable).
        assign_mlp_ratio: hidden widths of the token mixing and of the channel MLP, over hidden_size.
        drop_path_rate: stochastic depth of the last layer; earlier layers rise to it linearly from 0.
            The published recipe trains with 0.1.
        assign_hard: hard assignment with the straight-through gradient, else soft.
        assign_gumbel: Gumbel noise on the assignment in training; None: as ``assign_hard``, like
            the original.
        assign_tau: temperature that divides the assignment logits.
        group_residual: add the group token to what its members give it. Off, the token cannot carry the
            image past the assignment.
        group_mixing: ``attention`` among groups in the layers after the last grouping block, or ``none``:
            those layers are a per-group MLP, so groups stay apart.
        group_token_std: standard deviation of first-stage group tokens at initialisation; 0.02 in the
            original.
        assign_init_gain: multiplies the initial query and key projections of the assignment.
        linear_init: how linear layers start: ``normal`` (truncated, ``initializer_range``, zero biases), as in
            the original, or ``uniform``, PyTorch's own (bounds and biases of 1/sqrt(fan in)), which suits
            narrow towers and short runs.
    """

    model_type: ClassVar[str] = "groupvit_vision_model"
    whole_key: ClassVar[str] = "vision_config"
    extensions: ClassVar[frozenset[str]] = frozenset(
        {
            "drop_path_rate",
            "assign_hard",
            "assign_gumbel",
            "assign_tau",
            "group_residual",
            "group_mixing",
            "group_token_std",
            "assign_init_gain",
            "linear_init",
        }
    )
    fixed: ClassVar[Fixed] = TOWER

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int | None = None
    depths: list[int] = field(default_factory=lambda: [6, 3, 3])
    num_group_tokens: list[int] = field(default_factory=lambda: [64, 8, 0])
    num_output_groups: list[int] = field(default_factory=lambda: [64, 8, 8])
    num_attention_heads: int = 6
    image_size: Any = 224
    patch_size: Any = 16
    num_channels: int = 3
    hidden_act: Any = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    assign_eps: float = 1.0
    assign_mlp_ratio: list[float] = field(default_factory=lambda: [0.5, 4])

    drop_path_rate: float = 0.0
    assign_hard: bool = True
    assign_gumbel: bool | None = None
    assign_tau: float = 1.0
    group_residual: bool = True
    group_mixing: str = "attention"
    group_token_std: float = 0.02
    assign_init_gain: float = 1.0
    linear_init: str = "normal"

    def __post_init__(self) -> None:
        self.depths = list(self.depths)
        self.num_group_tokens = list(self.num_group_tokens)
        groups = list(self.num_output_groups)
        # The original lists the groups of the grouping stages only.
        if groups and len(groups) == len(self.depths) - 1:
            groups.append(groups[-1])
        self.num_output_groups = groups
        ratio = self.assign_mlp_ratio
        self.assign_mlp_ratio = list(ratio) if isinstance(ratio, Sequence) else [ratio, ratio]
        if not len(self.depths) == len(self.num_group_tokens) == len(groups):
            raise ValueError(
                f"depths {self.depths}, num_group_tokens {self.num_group_tokens} and num_output_groups "
                f"{groups} must have one entry per stage; make them the same length."
            )
        self.num_hidden_layers = sum(self.depths)
        _check_heads(self.hidden_size, self.num_attention_heads, "vision")
        if self.group_mixing not in ("attention", "none"):
            raise ValueError(f"group_mixing={self.group_mixing!r} is not known; use 'attention' or 'none'.")
        if self.linear_init not in ("normal", "uniform"):
            raise ValueError(f"linear_init={self.linear_init!r} is not known; use 'normal' or 'uniform'.")
        height, width = self.image_hw
        patch_height, patch_width = self.patch_hw
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"image_size {height}x{width} is not a multiple of patch_size {patch_height}x{patch_width}; "
                "choose sizes that divide."
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels that the position embeddings are made for."""
        return _pair(self.image_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        return _pair(self.patch_size)

    @property
    def gumbel(self) -> bool:
        return self.assign_hard if self.assign_gumbel is None else self.assign_gumbel


@configuration
class GroupViTConfig(ModelConfig):
    """Both towers and the projectors into the shared space."""

    model_type: ClassVar[str] = "groupvit"

    text_config: GroupViTTextConfig = field(default_factory=GroupViTTextConfig)
    vision_config: GroupViTVisionConfig = field(default_factory=GroupViTVisionConfig)
    projection_dim: int = 256
    projection_intermediate_dim: int = 4096
    logit_scale_init_value: float = 2.6592
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    output_segmentation: bool = False

    def __post_init__(self) -> None:
        # Dictionaries, as in a config.json, serve as well.
        if not isinstance(self.text_config, GroupViTTextConfig):
            self.text_config = GroupViTTextConfig.part_from_dict(self.text_config or {})
        if not isinstance(self.vision_config, GroupViTVisionConfig):
            self.vision_config = GroupViTVisionConfig.part_from_dict(self.vision_config or {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GroupViTConfig:
        values = dict(values)
        # Files of early releases repeat a tower under "*_config_dict"; where present it takes precedence.
        for name in ("text_config", "vision_config"):
            if values.get(f"{name}_dict"):
                values[name] = {**(values.get(name) or {}), **values[f"{name}_dict"]}
        return super().from_dict(values)

    @classmethod
    def from_text_vision_configs(
        cls, text_config: GroupViTTextConfig, vision_config: GroupViTVisionConfig, **kwargs: Any
    ) -> GroupViTConfig:
        return cls(text_config=text_config, vision_config=vision_config, **kwargs)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _check_heads(width: int, heads: int, tower: str) -> None:
    if width % heads:
        raise ValueError(
            f"hidden_size {width} of the {tower} tower is not divisible by num_attention_heads {heads}; "
            "change one of them."
        )
