"""What an image tower is made of, one class a tower; ``vision_config.model_type`` says which.

Whatever reads an image's keys asks the configuration for the numbers of its tower: ``embed_dim``, ``num_tokens``,
``layer_tokens`` and ``multiply_adds`` are there on every one of them.

Legend: P patches, S tokens of an encoded image, E embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from ...configuration import ModelConfig, configuration
from ...foreign_settings import Fixed
from ...groupvit.configuration import GroupViTVisionConfig
from ..setting_checks import ACTIVATIONS, known, non_negative, positive, probability, require

POSITION_INITS = ("normal", "sincos")

# What the towers are, by the names that relatives and first releases give such settings.
VISION: Fixed = {
    "attention_bias": lambda vision: (True,),
    "mlp_bias": lambda vision: (True,),
    "qkv_bias": lambda vision: (True,),
    "num_key_value_heads": lambda vision: (vision.num_attention_heads,),
    "head_dim": lambda vision: (vision.embed_dim // vision.num_attention_heads,),
    "hidden_activation": lambda vision: (vision.hidden_act,),
    "activation_function": lambda vision: (vision.hidden_act,),
    "position_embedding_type": lambda vision: ("absolute",),
    "attention_probs_dropout_prob": lambda vision: (vision.attention_dropout,),
}


@configuration
class IdeficsVisionConfig(ModelConfig):
    """The image encoder, a CLIP vision transformer.

    ``embed_dim`` is its width; ``image_size`` and ``patch_size`` are in pixels and images are square.
    ``attention_dropout`` acts on attention probabilities in training. New weights are drawn with standard
    deviation ``initializer_range * initializer_factor``. ``position_init`` is ``normal``, as CLIP starts its
    position embeddings, or ``sincos``, from sines and cosines of rows and columns, which short runs from scratch
    learn places from sooner (Beyer, Zhai, Kolesnikov 2022).
    """

    model_type: ClassVar[str] = "idefics_vision"
    fixed: ClassVar[Fixed] = VISION
    part_of: ClassVar[str] = "vision_config"
    aliases: ClassVar[Mapping[str, str]] = {"hidden_size": "embed_dim"}
    extensions: ClassVar[frozenset[str]] = frozenset({"position_init"})
    prefix_tokens: ClassVar[int] = 1  # with a learnt position: the class token
    patch_bias: ClassVar[bool] = False

    embed_dim: int = 768
    image_size: int = 224
    intermediate_size: int = 5120
    patch_size: int = 14
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    position_init: str = "normal"

    def __post_init__(self) -> None:
        positive(self, "embed_dim", "image_size", "intermediate_size", "patch_size", "num_hidden_layers")
        positive(self, "num_attention_heads", "num_channels")
        known(self, "hidden_act", ACTIVATIONS)
        known(self, "position_init", POSITION_INITS)
        require(
            self.position_init == "normal" or self.embed_dim % 4 == 0,
            f"embed_dim {self.embed_dim} does not split into sines and cosines of rows and columns; choose a "
            "multiple of 4, or position_init=normal.",
        )
        probability(self, "attention_dropout")
        non_negative(self, "layer_norm_eps", "initializer_range", "initializer_factor")
        require(
            self.embed_dim % self.num_attention_heads == 0,
            f"embed_dim {self.embed_dim} of the vision encoder is not a multiple of its num_attention_heads "
            f"{self.num_attention_heads}; choose widths that divide evenly.",
        )
        require(
            self.image_size >= self.patch_size,
            f"image_size {self.image_size} is less than patch_size {self.patch_size}; use smaller patches.",
        )

    @property
    def hidden_size(self) -> int:
        """The width, under the name other encoders use."""
        return self.embed_dim

    @property
    def position_grid(self) -> int:
        """Patches a side that the position table has rows for."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches'."""
        return self.prefix_tokens

    @property
    def num_tokens(self) -> int:
        """S: tokens of an encoded image, and so the keys of an image without a resampler."""
        return self.num_prefix_tokens + (self.image_size // self.patch_size) ** 2

    @property
    def layer_tokens(self) -> tuple[tuple[int, int], ...]:
        """(layers, tokens that each of them attends among), in the order they run."""
        return ((self.num_hidden_layers, self.num_tokens),)

    @property
    def mlp_matrices(self) -> int:
        """Matrices of E x intermediate_size in an MLP."""
        return 2

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products and attentions of an image's forward pass."""
        side, seen = self.embed_dim, self.num_tokens
        patches = (self.image_size // self.patch_size) ** 2
        embed = patches * side * self.num_channels * self.patch_size**2
        layer = seen * (4 * side**2 + self.mlp_matrices * side * self.intermediate_size) + 2 * seen**2 * side
        return embed + self.num_hidden_layers * layer

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a ``config.json``, of a whole model too.

        Raises:
            ValueError: as `ModelConfig.from_dict`, or a whole model's file describes another tower.
        """
        whole = values.get(cls.part_of)
        if isinstance(whole, dict) and not issubclass(tower_config(whole.get("model_type")), cls):
            other = tower_config(whole.get("model_type"))
            raise ValueError(
                f"config.json describes a tower {other.model_type!r}, but {cls.__name__} is {cls.model_type!r}; "
                f"use {other.__name__}."
            )
        return super().from_dict(values)

    @classmethod
    def part_from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping in a ``config.json``, in which a size may be given as two equal numbers."""
        values = dict(values)
        for name in ("image_size", "patch_size"):
            pair = values.get(name)
            if isinstance(pair, (list, tuple)) and len(set(pair)) == 1:
                values[name] = pair[0]
        return super().part_from_dict(values)


@configuration
class IdeficsSiglipConfig(IdeficsVisionConfig):
    """SigLIP's tower (Zhai et al. 2023), and SigLIP 2's of fixed resolution (Tschannen et al. 2025): no class token.

    ``last_hidden_state`` is after the last norm; the attention pooling behind it serves contrastive learning alone.
    """

    model_type: ClassVar[str] = "siglip_vision_model"
    prefix_tokens: ClassVar[int] = 0
    patch_bias: ClassVar[bool] = True

    intermediate_size: int = 3072
    patch_size: int = 16
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@configuration
class IdeficsDinov2Config(IdeficsVisionConfig):
    """DINOv2's tower (Oquab et al. 2023): a class token, and a scale a channel on every residual branch.

    ``image_size`` is that of the images it is given; ``position_size`` that of the images its positions were learnt
    on, where they differ (released: 518): positions are interpolated between the two. ``layerscale_value`` is what
    the scales start from. ``use_swiglu_ffn`` makes the MLPs gated, ``intermediate_size`` wide, as in the giant model.
    A ``mlp_ratio`` gives ``intermediate_size`` where a file has only that.
    """

    model_type: ClassVar[str] = "dinov2"
    aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "embed_dim",
        "attention_probs_dropout_prob": "attention_dropout",
    }
    extensions: ClassVar[frozenset[str]] = frozenset({"position_init", "position_size"})
    fixed: ClassVar[Fixed] = {
        **VISION,
        "hidden_dropout_prob": lambda vision: (0.0,),
        "drop_path_rate": lambda vision: (0.0,),
    }
    patch_bias: ClassVar[bool] = True
    antialias: ClassVar[bool] = False  # of the interpolation of positions

    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-6
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    position_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.position_size is None or self.position_size >= self.patch_size,
            f"position_size {self.position_size} is less than patch_size {self.patch_size}; give the pixels of a "
            "side that the positions were learnt on.",
        )

    @property
    def position_grid(self) -> int:
        return (self.position_size or self.image_size) // self.patch_size

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.use_swiglu_ffn else 2

    @classmethod
    def part_from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping in a ``config.json``; ``mlp_ratio`` gives the width of the MLPs that it lacks."""
        values = dict(values)
        ratio = values.pop("mlp_ratio", None)
        if ratio is not None and values.get("intermediate_size") is None:
            require(
                isinstance(ratio, (int, float)) and 0 < ratio < 1e6,
                f"{cls.__name__} was given mlp_ratio={ratio!r}; give the width of the MLPs over the tower's, 4 say.",
            )
            width = values.get("embed_dim", values.get("hidden_size", cls.embed_dim))
            inner = int(width * ratio)
            # Two thirds of the width, for there are three matrices, rounded up to a multiple of 8.
            values["intermediate_size"] = (
                (int(inner * 2 / 3) + 7) // 8 * 8 if values.get("use_swiglu_ffn") else inner
            )
        return super().part_from_dict(values)


@configuration
class IdeficsDinov2WithRegistersConfig(IdeficsDinov2Config):
    """DINOv2 with registers (Darcet et al. 2024): tokens of no place, after the class token, that gather what concerns
    the whole image.
    """

    model_type: ClassVar[str] = "dinov2_with_registers"
    antialias: ClassVar[bool] = True

    num_register_tokens: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative(self, "num_register_tokens")

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens


@configuration
class IdeficsGroupViTConfig(GroupViTVisionConfig):
    """GroupViT's image tower (Xu et al. 2022): an image's keys are its last groups, a few vectors of an object each.

    The fields are `GroupViTVisionConfig`'s. As a tower it is deterministic: the assignment takes no Gumbel noise, and
    dropout and stochastic depth are those of GroupViT's own training.
    """

    part_of: ClassVar[str] = "vision_config"
    aliases: ClassVar[Mapping[str, str]] = {"embed_dim": "hidden_size"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (height, width) in (("image_size", self.image_hw), ("patch_size", self.patch_hw)):
            require(
                height == width,
                f"{name} {height}x{width} of a GroupViT is not square; images of IDEFICS are, so give a tower of "
                "square images.",
            )
            setattr(self, name, height)

    @property
    def embed_dim(self) -> int:
        """The width, under the name that IDEFICS gives it."""
        return self.hidden_size

    @property
    def num_tokens(self) -> int:
        """S: groups that the last grouping stage leaves."""
        return self._walk()[1]

    @property
    def layer_tokens(self) -> tuple[tuple[int, int], ...]:
        """(layers, tokens that each of them attends among): a pair a stage."""
        return tuple(
            (depth, tokens + own)
            for depth, tokens, own in zip(self.depths, self._walk()[0], self.num_group_tokens, strict=True)
            if depth
        )

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products and attentions of an image's forward pass."""
        width, inner = self.hidden_size, self.intermediate_size
        across, along = (int(ratio * width) for ratio in self.assign_mlp_ratio)
        entering, _ = self._walk()
        total = entering[0] * width * self.num_channels * self.patch_hw[0] * self.patch_hw[1]
        previous = 0
        for depth, tokens, own, groups in zip(
            self.depths, entering, self.num_group_tokens, self.num_output_groups, strict=True
        ):
            seen = tokens + own
            mixing = own > 0 or self.group_mixing == "attention"
            attention = 4 * seen * width**2 + 2 * seen**2 * width if mixing else 0
            total += depth * (attention + 2 * seen * width * inner)
            if own:
                if previous:
                    total += width * (width // 2) * (previous + own)  # the tokens of the stage before
                total += width * across * (own + groups)  # group tokens to groups
                # Groups look at the tokens, then claim them: queries and outputs, keys and values, both products.
                total += 2 * (2 * groups * width**2 + 2 * tokens * width**2 + 2 * groups * tokens * width)
                total += 2 * groups * width * inner + 2 * groups * width * along
            previous = own
        return total

    def _walk(self) -> tuple[list[int], int]:
        """Tokens that enter each stage, and those that leave the last."""
        tokens = (self.image_hw[0] // self.patch_hw[0]) * (self.image_hw[1] // self.patch_hw[1])
        entering = []
        for own, groups in zip(self.num_group_tokens, self.num_output_groups, strict=True):
            entering.append(tokens)
            tokens = groups if own else tokens
        return entering, tokens


VisionConfig = IdeficsVisionConfig | IdeficsGroupViTConfig

TOWER_CONFIGS: dict[str, type[IdeficsVisionConfig] | type[IdeficsGroupViTConfig]] = {
    kind.model_type: kind
    for kind in (
        IdeficsVisionConfig,
        IdeficsSiglipConfig,
        IdeficsDinov2Config,
        IdeficsDinov2WithRegistersConfig,
        IdeficsGroupViTConfig,
    )
}
# What earlier releases and CLIP's own files call IDEFICS's tower.
_CLIP_TOO = (None, "", "idefics", "clip_vision_model", "clip")


def tower_config(model_type: str | None) -> type[IdeficsVisionConfig] | type[IdeficsGroupViTConfig]:
    """The configuration class of a tower.

    Raises:
        ValueError: no tower has this name.
    """
    if model_type in _CLIP_TOO:
        return IdeficsVisionConfig
    if model_type not in TOWER_CONFIGS:
        naflex = " NaFlex models take images of any shape; take one of fixed resolution, as siglip2-base-patch16-224."
        raise ValueError(
            f"vision_config.model_type is {model_type!r}, which is no image tower that is known here; choose one of "
            f"{', '.join(TOWER_CONFIGS)}.{naflex if str(model_type).startswith('siglip2') else ''}"
        )
    return TOWER_CONFIGS[model_type]


def read_vision_config(value: Any) -> VisionConfig:
    """The configuration that a mapping, a configuration of another library's, or None (the default tower) describes.

    Raises:
        ValueError: its ``model_type`` is not known, or a setting is not the tower's.
    """
    if value is None:
        return IdeficsVisionConfig()
    if isinstance(value, (IdeficsVisionConfig, IdeficsGroupViTConfig)):
        return value
    values = dict(value.to_dict() if hasattr(value, "to_dict") else value)
    return tower_config(values.get("model_type")).part_from_dict(values)
