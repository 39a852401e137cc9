"""What an IDEFICS model is made of: the parameters of its ``config.json``, checked when they are given.

Names and defaults are those users know from Transformers; ``idefics_9b_config`` and ``idefics_80b_config``
give the shapes of the released models (IDEFICS model card, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, ClassVar, Self

from ..configuration import Implied, ModelConfig, configuration
from ..foreign_settings import Fixed
from .architecture import (
    OWN_MODEL_TYPE,
    SLIDING,
    TEXT_EXTENSIONS,
    beyond_idefics,
    check_text,
    refuse_in_idefics,
)
from .rope import THETA, check_rope, one_rope
from .setting_checks import ACTIVATIONS, known, non_negative, positive, probability, require
from .towers.configuration import IdeficsVisionConfig, VisionConfig, read_vision_config

ALPHA_INITIALIZERS = ("zeros", "ones", "normal", "gaussian", "random")
ALPHA_TYPES = ("float", "vector")
FREEZE_EXCEPTIONS = ("LayerNorm", "Linear", "Embedding")

# What the text part is, by the names that relatives and first releases give such settings.
TEXT: Fixed = {
    "word_embed_proj_dim": lambda text: (text.hidden_size,),
    "hidden_activation": lambda text: (text.hidden_act,),
    "activation_function": lambda text: (text.hidden_act,),
    "cross_layer_activation_function": lambda text: ("swiglu",),
    "cross_attention_activation_function": lambda text: ("swiglu",),
    "partial_rotary_factor": lambda text: (1.0,),
    "is_encoder_decoder": lambda text: (False,),
    "add_cross_attention": lambda text: (False,),
}


@configuration
class IdeficsPerceiverConfig(ModelConfig):
    """The resampler that turns an image's patches into ``resampler_n_latents`` vectors.

    ``use_resampler`` is carried only for the files: released checkpoints leave it false here and set it on
    ``IdeficsConfig``, which alone decides.
    """

    model_type: ClassVar[str] = "idefics_perciever"  # spelt as in every released file
    part_of: ClassVar[str] = "perceiver_config"

    use_resampler: bool = False
    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = False

    def __post_init__(self) -> None:
        positive(self, "resampler_n_latents", "resampler_depth", "resampler_n_heads", "resampler_head_dim")


@configuration
class IdeficsConfig(ModelConfig):
    """A language model (LLaMA, or a relative of it) that reads images through gated cross-attention blocks.

    What relatives have beside LLaMA (grouped heads, biases, windows, …) are fields too. A configuration that says any
    of it is written with the ``model_type`` ``interloom_idefics``: other programs' IDEFICS would load the weights and
    compute something else.

    Args:
        vocab_size: Tokens of the base model; their embeddings can be frozen.
        additional_vocab_size: Tokens added to it (``<image>`` and the like), always trained, in own tables.
        dropout: Probability used on attention probabilities and on every residual branch, in training only.
        alpha_initializer: What the gates start from: ``zeros`` (the model starts as the text model),
            ``ones``, or a draw (``normal``, ``gaussian`` and ``random`` are the same) of standard deviation
            ``alphas_initializer_range``.
        alpha_type: One gate a block (``float``) or one a channel (``vector``).
        cross_layer_interval: A gated block stands before the first decoder layer and every this many after it.
        qk_layer_norms: RMS norms on the queries and keys of the cross-attention.
        freeze_text_layers, freeze_vision_layers: Leave the pretrained parts as they are; layers of a kind
            named in the matching ``…_module_exceptions`` (``LayerNorm``, ``Linear``, ``Embedding``, or a class
            of the model such as ``IdeficsMLP``) stay trainable. ``LayerNorm`` covers the text model's RMS norms
            too.
        hidden_act: Name of an activation, or a function of a tensor, which no file can hold.
        freeze_lm_head: Leave the base rows of the head as they are.
        vision_config: The image tower; its ``model_type`` says which (:mod:`.towers.configuration`).
        use_resampler: Pass images through the perceiver of ``perceiver_config``.
        rope_parameters: Rotary positions, see :mod:`~.rope`; ``{"rope_type": "default", "rope_theta": 10000.0}``.
        num_key_value_heads: Heads of keys and values; each serves as many heads of queries. As many as these, by
            default.
        head_dim: Width of a head; ``hidden_size / num_attention_heads`` by default.
        attention_bias, attention_output_bias, mlp_bias: Biases of the query, key and value projections, of the output
            projection, and of the feed-forward layers.
        text_qk_norms: RMS norms on the queries and keys of the self-attention.
        sliding_window: A token sees itself and the ``sliding_window - 1`` tokens before it alone.
        layer_types: ``sliding_attention`` or ``full_attention`` for each layer; with a window all slide by default.
    """

    model_type: ClassVar[str] = "idefics"
    sub_configs: ClassVar[Mapping[str, type[ModelConfig]]] = {
        "vision_config": IdeficsVisionConfig,
        "perceiver_config": IdeficsPerceiverConfig,
    }
    choices: ClassVar[frozenset[str]] = frozenset({"vision_config"})
    extensions: ClassVar[frozenset[str]] = TEXT_EXTENSIONS
    fixed: ClassVar[Fixed] = TEXT

    vocab_size: int = 32000
    additional_vocab_size: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    dropout: float = 0.0
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    alpha_initializer: str = "zeros"
    alphas_initializer_range: float = 0.0
    alpha_type: str = "float"
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: Any = 2  # an id, several, or None
    tie_word_embeddings: bool = False
    cross_layer_interval: int = 1
    qk_layer_norms: bool = False
    freeze_text_layers: bool = True
    freeze_text_module_exceptions: list[str] = field(default_factory=list)
    freeze_lm_head: bool = False
    freeze_vision_layers: bool = True
    freeze_vision_module_exceptions: list[str] = field(default_factory=list)
    use_resampler: bool = False
    vision_config: VisionConfig = field(default_factory=IdeficsVisionConfig)
    perceiver_config: IdeficsPerceiverConfig = field(default_factory=IdeficsPerceiverConfig)
    rope_parameters: dict[str, Any] | None = None
    num_key_value_heads: Implied = Implied(lambda config: config.num_attention_heads)
    head_dim: Implied = Implied(lambda config: config.hidden_size // config.num_attention_heads)
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    text_qk_norms: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        self.vision_config = read_vision_config(self.vision_config)
        self.perceiver_config = _nested(IdeficsPerceiverConfig, self.perceiver_config)
        positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        positive(self, "num_attention_heads", "cross_layer_interval")
        non_negative(
            self, "additional_vocab_size", "initializer_range", "alphas_initializer_range", "rms_norm_eps"
        )
        known(self, "hidden_act", ACTIVATIONS)
        known(self, "alpha_initializer", ALPHA_INITIALIZERS)
        known(self, "alpha_type", ALPHA_TYPES)
        probability(self, "dropout")
        check_text(self)
        for name in ("freeze_text_module_exceptions", "freeze_vision_module_exceptions"):
            exceptions = list(getattr(self, name) or [])
            setattr(self, name, exceptions)
            for exception in exceptions:
                require(
                    exception in FREEZE_EXCEPTIONS
                    or isinstance(exception, type)
                    or exception[:7] == "Idefics",
                    f"{name} names {exception!r}; choose from {', '.join(FREEZE_EXCEPTIONS)}, or give the name "
                    "of one of the model's classes (IdeficsRMSNorm).",
                )
        check_rope(self.rope_parameters)

    @property
    def gated_blocks(self) -> int:
        """How many gated cross-attention blocks there are."""
        return -(-self.num_hidden_layers // self.cross_layer_interval)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token of a decoder layer sees, itself included; None for all before it."""
        slides = self.layer_types is None or self.layer_types[layer] == SLIDING
        return self.sliding_window if slides else None

    @property
    def total_vocab_size(self) -> int:
        """Width of the logits: base and additional tokens."""
        return self.vocab_size + self.additional_vocab_size

    @property
    def rope_theta(self) -> float:
        return float((self.rope_parameters or {}).get("rope_theta") or THETA)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a sequence, as a list."""
        if self.eos_token_id is None:
            return []
        return [self.eos_token_id] if isinstance(self.eos_token_id, int) else list(self.eos_token_id)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from the content of a ``config.json``, of Transformers or of ours."""
        if values.get("model_type") == OWN_MODEL_TYPE:
            return super().from_dict({**values, "model_type": cls.model_type})
        config = super().from_dict(values)
        if values.get("model_type") == cls.model_type:
            refuse_in_idefics(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``model_type`` says whether other programs' IDEFICS computes the same."""
        values = super().to_dict()
        return {**values, "model_type": OWN_MODEL_TYPE} if beyond_idefics(self) else values

    @classmethod
    def part_from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a ``config.json`` mapping of any release.

        Nested parts that are null take their defaults. The oldest files have none and say flat what is in them:
        ``vision_embed_dim``, ``vision_image_size`` and so on, ``resampler_depth`` and the like; beside nested parts
        such keys are leftovers that no release reads.
        """
        values = {k: v for k, v in values.items() if v is not None or k not in _PARTS}
        for part, (cls_of_part, prefix) in _PARTS.items():
            if part in values:
                continue
            keys = {field.name: f"{prefix}{field.name}" for field in fields(cls_of_part)}
            flat = {name: values.pop(key) for name, key in keys.items() if key in values and key not in _OWN}
            values[part] = {name: value for name, value in flat.items() if value is not None}
        one_rope(values)
        return super().part_from_dict(values)


_PARTS: dict[str, tuple[Any, str]] = {
    "vision_config": (IdeficsVisionConfig, "vision_"),
    "perceiver_config": (IdeficsPerceiverConfig, ""),
}
_OWN = frozenset(field.name for field in fields(IdeficsConfig))


def _nested(cls: Any, value: Any) -> Any:
    if value is None:
        return cls()
    if isinstance(value, cls):
        return value
    return cls.part_from_dict(dict(value.to_dict() if hasattr(value, "to_dict") else value))


def _released(**text: Any) -> IdeficsConfig:
    return IdeficsConfig(
        additional_vocab_size=2,
        alpha_type="float",
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config=IdeficsVisionConfig(embed_dim=1280),
        perceiver_config=IdeficsPerceiverConfig(qk_layer_norms_perceiver=True),
        **text,
    )


def idefics_9b_config() -> IdeficsConfig:
    """LLaMA-7B with CLIP ViT-H/14: the shape of ``HuggingFaceM4/idefics-9b``."""
    return _released()


def idefics_80b_config() -> IdeficsConfig:
    """LLaMA-65B with CLIP ViT-H/14: the shape of ``HuggingFaceM4/idefics-80b``."""
    return _released(
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=80,
        num_attention_heads=64,
        rms_norm_eps=1e-5,
    )
