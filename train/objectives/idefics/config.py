"""What `interloom train` may be told of an IDEFICS: the Hydra group ``model``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ....models.idefics.configuration import IdeficsConfig, IdeficsPerceiverConfig
from ....models.idefics.quantized import BLOCK_SIZES, COMPUTE_DTYPES, KINDS, Storage
from ....models.idefics.towers.configuration import TOWER_CONFIGS, tower_config
from ..schema import hydra_schema, hydra_schema_of_kinds

VisionSchema = hydra_schema_of_kinds("model_type", TOWER_CONFIGS)
PerceiverSchema = hydra_schema(IdeficsPerceiverConfig)
ModelSchema = hydra_schema(IdeficsConfig, vision_config=VisionSchema, perceiver_config=PerceiverSchema)
LORA_PARTS = ("text", "vision", "both")
FROZEN_DTYPES = ("float32", "bfloat16")
LORA_EXPORTS = ("merged", "adapters")


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) on the attention and MLP projections, through ``peft``.

    The text part has those of the gated blocks too, where ``freeze_cross_attention`` holds them still.

    Args:
        rank: of the adapters; 0 leaves them out.
        alpha: their scale is ``alpha / rank``.
        dropout: before them, in training.
        parts: ``text``, ``vision`` or ``both``; what is not adapted trains as the model's freeze flags say.
        export: what the run writes at its end: the model with the adapters ``merged`` in, or the ``adapters`` alone
            in ``peft``'s format, with what else was trained.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    parts: str = "text"
    export: str = "merged"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"model.lora.rank={self.rank} must be 0 (off) or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout={self.dropout} must be at least 0 and below 1.")
        if self.parts not in LORA_PARTS:
            raise ValueError(f"model.lora.parts={self.parts!r} is not known; use {', '.join(LORA_PARTS)}.")
        if self.export not in LORA_EXPORTS:
            raise ValueError(
                f"model.lora.export={self.export!r} is not known; use {', '.join(LORA_EXPORTS)}."
            )


@dataclass
class QuantizationConfig:
    """How ``model.quantize`` stores frozen matrices.

    Args:
        block_size: weights of ``nf4`` that share a scale.
        double_quant: scales of a byte instead of four (Dettmers et al., 2023, section 3).
        compute_dtype: of the products with them; ``auto`` is that of ``trainer.precision``.
        skip: names of modules, or of parts of the model, that are left as they are (``vision_model``, ``o_proj``).
    """

    block_size: int = 64
    double_quant: bool = True
    compute_dtype: str = "auto"
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"model.quantization.block_size={self.block_size} is not known; use "
                f"{', '.join(map(str, BLOCK_SIZES))}."
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"model.quantization.compute_dtype={self.compute_dtype!r} is not known; use "
                f"{', '.join(COMPUTE_DTYPES)}."
            )


@dataclass
class IdeficsTrainConfig:
    """An IDEFICS and its objective.

    Args:
        family: which LightningModule trains it.
        config: the fields of ``IdeficsConfig``, nested ones and freeze flags included. ``vision_config.model_type``
            chooses the image tower: fields that all towers have mean the same in each, and must be given where a
            tower's differ from the default one's; those of one tower alone are its own defaults where they are null.
        z_loss: weight of the squared log-sum-exp; the released base models used 1e-3.
        predict_image_tokens: whether ``<image>`` and its neighbours are labels, as the originals were trained.
        gradient_checkpointing: recompute activations, layer by layer.
        reset_freezing: take the freeze flags from here rather than from ``init_checkpoint``, whose released
            files leave everything trainable.
        freeze_cross_attention: leave the projections and MLPs of the gated blocks as they are; their gates and
            norms still train.
        frozen_dtype: ``float32``, or ``bfloat16`` to keep the matrices that do not train in half the memory.
        quantize: ``nf4`` or ``int8`` to store the matrices of the layers that do not train in 4 or 8 bits; None
            leaves them as they are. Checkpoints then hold only what trains.
        quantization: how they are stored.
        lora: adapters.
        feature_cache: folder for the features of a frozen image encoder, so that later epochs skip it; about
            S * E * 2 or 4 bytes an image (0.7 MB in bfloat16 for the released towers). None encodes every time.
        init_checkpoint: weights to begin from, anything ``checkpoint=`` takes; None draws them.
        init_text, init_vision: a language model and an image tower to compose the model of, as ``interloom compose``
            takes them. ``config`` then says how they are joined; the rest of it follows them.
    """

    family: str = "idefics"
    config: ModelSchema = field(default_factory=ModelSchema)  # type: ignore[valid-type]
    z_loss: float = 0.0
    predict_image_tokens: bool = True
    gradient_checkpointing: bool = False
    reset_freezing: bool = True
    freeze_cross_attention: bool = False
    frozen_dtype: str = "float32"
    quantize: str | None = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    feature_cache: str | None = None
    init_checkpoint: str | None = None
    init_text: str | None = None
    init_vision: str | None = None

    def __post_init__(self) -> None:
        if self.z_loss < 0:
            raise ValueError(f"model.z_loss={self.z_loss} must be 0 or more.")
        if self.frozen_dtype not in FROZEN_DTYPES:
            raise ValueError(
                f"model.frozen_dtype={self.frozen_dtype!r} is not known; use {', '.join(FROZEN_DTYPES)}."
            )
        if self.quantize is not None and self.quantize not in KINDS:
            raise ValueError(
                f"model.quantize={self.quantize!r} is not known; use {', '.join(KINDS)}, or null for none."
            )
        if self.lora.export == "adapters" and not self.lora.rank:
            raise ValueError(
                "model.lora.export=adapters needs adapters; set model.lora.rank, or model.lora.export=merged."
            )

    @property
    def storage(self) -> Storage | None:
        """How frozen matrices are stored; None where they are left as they are."""
        how = self.quantization
        if self.quantize is None:
            return None
        return Storage(self.quantize, how.block_size, how.double_quant, how.compute_dtype)

    def model_config(self) -> IdeficsConfig:
        """The configuration of the model itself."""
        values: dict[str, Any] = vars(self.config)
        parts = {
            "vision_config": _tower(vars(values["vision_config"])),
            "perceiver_config": vars(values["perceiver_config"]),
        }
        return IdeficsConfig.from_dict({**values, **parts})


def _tower(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the tower that ``model_type`` names.

    Raises:
        ValueError: there is no such tower, or a setting is of another.
    """
    kind = tower_config(given["model_type"])
    known = {field.name for field in fields(kind)} | set(kind.aliases) | {"model_type"}
    plain = vars(VisionSchema())
    alien = sorted(k for k, v in given.items() if k not in known and v != plain[k])
    if alien:
        raise ValueError(
            f"model.config.vision_config has {', '.join(alien)}, which a tower {kind.model_type!r} does not have; "
            "leave it out, or choose another model_type."
        )
    return {k: v for k, v in given.items() if k in known and v is not None}
