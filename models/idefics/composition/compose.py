"""Put a language model and an image tower together: an IDEFICS that is the language model until it is trained.

Gates start at zero, so what is added changes nothing yet; resampler and gated blocks are drawn as a new model draws
them; tokens of pictures start at the mean of the base tokens (Laurençon et al., "OBELICS", 2023, section 5).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...archives import check_layers
from ...checkpoint import HubOptions, load_into
from ...files import staged_folder
from ..causal_lm import IdeficsForVisionText2Text
from ..configuration import IdeficsConfig
from ..image_processing import IdeficsImageProcessor
from ..processing import IdeficsProcessor
from ..prompt import END_OF_UTTERANCE, FAKE_TOKEN, IMAGE_TOKEN
from .text_source import TextSource
from .text_sources import read_text_source
from .vision_sources import VisionTower, read_vision_tower
from .vocabulary import make_room

_VISION = "model.vision_model."
_LATENTS = 64
_MOST_KEYS = 64  # an image's vectors that gated blocks read as they are, without a resampler to make fewer
_HEAD_PER_WIDTH = 80  # IDEFICS's resampler: 16 heads for an image width of 1280


@dataclass(frozen=True)
class ComposeOptions:
    """How the parts are joined.

    Args:
        cross_layer_interval: a gated block stands before the first layer and every this many; None takes an eighth of
            the layers, 4 at most: about eight blocks, as IDEFICS-9B has.
        resampler: reduce an image's vectors to ``latents``; None does so where these are given, or the tower gives more
            than 64.
        latents: vectors that the resampler makes of an image; 64 by default.
        alpha: ``float`` (a gate for each block) or ``vector`` (one for each channel), which start at zero; or a number
            that each block's gate starts at.
        qk_norm: norms on the queries and keys of the gated blocks and of the resampler.
        end_of_utterance: add the token that ends a turn of a dialogue.
        seed: what the new weights are drawn from.
        dtype: of all weights; None keeps that of the language model.
    """

    cross_layer_interval: int | None = None
    resampler: bool | None = None
    latents: int | None = None
    alpha: str | float = "float"
    qk_norm: bool = True
    end_of_utterance: bool = False
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("cross_layer_interval", "latents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more.")
        if self.latents is not None and self.resampler is False:
            raise ValueError(
                f"latents={self.latents} are made by a resampler, which is switched off; leave one out."
            )
        self.gate  # noqa: B018 (checked when it is given)

    @property
    def gate(self) -> tuple[str, float]:
        """``alpha_type``, and where gates start.

        Raises:
            ValueError: ``alpha`` is neither a type nor a number.
        """
        if self.alpha in ("float", "vector"):
            return str(self.alpha), 0.0
        try:
            start = float(self.alpha)
        except ValueError:
            start = math.nan
        if not math.isfinite(start):
            raise ValueError(
                f"alpha is {self.alpha!r}; give float, vector, or the number that gates start at."
            )
        return "float", start


class Composition:
    """A language model and an image tower that were found and fit together; weights are read by :meth:`model`.

    Args:
        text, vision: what :func:`read_text_source` and :func:`read_vision_tower` found.
        options: how they are joined.

    Raises:
        ValueError: the parts make no model.

    Attributes:
        config: of the model.
        processor: tokenizer with the tokens of pictures, and the tower's preparation of them.
    """

    def __init__(self, text: TextSource, vision: VisionTower, options: ComposeOptions | None = None) -> None:
        self.text, self.vision, self.options = text, vision, options or ComposeOptions()
        turns = self.options.end_of_utterance
        wanted = [FAKE_TOKEN, IMAGE_TOKEN, *([END_OF_UTTERANCE] if turns else [])]
        tokenizer, added = make_room(text.tokenizer, text.settings["vocab_size"], wanted, text.name)
        self.config = _configuration(text, vision, self.options, tokenizer, added)
        stored = text.stored + sum(tensor.nbytes for tensor in vision.weights.values())
        check_layers(self.config, stored, f"{text.name} with its image tower")
        images = IdeficsImageProcessor.from_dict(vision.image_processor)
        self.processor = IdeficsProcessor(images, tokenizer, add_end_of_utterance_token=turns or None)

    @classmethod
    def of(
        cls,
        text: str | Path,
        vision: str | Path,
        options: ComposeOptions | None = None,
        hub: HubOptions | None = None,
    ) -> Composition:
        """The same of two sources by name.

        Raises:
            ValueError: there is no such source, or the parts make no model.
        """
        return cls(read_text_source(text, hub), read_vision_tower(vision), options)

    def model(self, dtype: torch.dtype | None = None) -> IdeficsForVisionText2Text:
        """The model in evaluation mode, its weights read from the sources.

        Args:
            dtype: of the weights; None takes that of the options, or the language model's.

        Raises:
            ValueError: a source's weights are damaged, missing or of other shapes than its configuration says.
        """
        config = copy.deepcopy(self.config)
        config.additional_vocab_size = 0  # until there are rows that theirs can begin from
        with torch.device("meta"):
            model = IdeficsForVisionText2Text(config)
        kept = _Kept(dtype or self.options.dtype)
        load_into(
            model,
            kept.cast(self.text.tensors()),
            source=self.text.name,
            optional=lambda name: (
                not name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))
            ),
        )
        tower = ((f"{_VISION}{name}", tensor) for name, tensor in self.vision.weights.items())
        load_into(
            model,
            kept.cast(tower),
            source="the image tower",
            optional=lambda name: not name.startswith(_VISION),
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.options.seed)
            decoder = model.model
            decoder.reset_gated_blocks()
            if self.config.use_resampler:
                decoder.perceiver_resampler.reset_parameters()
            if start := self.options.gate[1]:
                for block in decoder.gated_cross_attn_layers:
                    block.alpha_cross_attn.fill_(start)  # pyright: ignore
                    block.alpha_dense.fill_(start)  # pyright: ignore
        model.to(kept.dtype or torch.float32)
        model.resize_token_embeddings(self.config.total_vocab_size)
        model.model.freeze_relevant_params()
        model.generation_config = self.text.generation
        return model.eval()

    def save(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> IdeficsForVisionText2Text:
        """Write the model and its processor to a folder, which appears whole or not at all.

        Raises:
            ValueError: as :meth:`model`; nothing is written then.
        """
        model = self.model()
        with staged_folder(folder) as staged:
            model.save_pretrained(staged, max_shard_size=max_shard_size)
            self.processor.save_pretrained(staged)
        return model


def compose(
    text: str | Path,
    vision: str | Path,
    options: ComposeOptions | None = None,
    *,
    hub: HubOptions | None = None,
) -> tuple[IdeficsForVisionText2Text, IdeficsProcessor]:
    """An IDEFICS of a language model and an image tower, and its processor.

    Args:
        text: a folder of Transformers, a hub id, or a GGUF file.
        vision: what :func:`read_vision_tower` takes.
        options: how they are joined.
        hub: where hub ids of the language model are fetched.

    Raises:
        ValueError: a source is none that is known, is damaged or not whole, or the two make no model.
    """
    made = Composition.of(text, vision, options, hub)
    return made.model(), made.processor


class _Kept:
    """Brings streamed weights to one type: the one asked for, or that of the first of the language model."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def cast(self, tensors: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if tensor.is_floating_point():
                self.dtype = self.dtype or tensor.dtype
                tensor = tensor.to(self.dtype)
            yield name, tensor


def _configuration(
    text: TextSource, vision: VisionTower, options: ComposeOptions, tokenizer: Any, added: int
) -> IdeficsConfig:
    layers, width = text.settings["num_hidden_layers"], vision.config.hidden_size
    interval = options.cross_layer_interval
    if interval is None:
        interval = min(4, max(1, layers // 8))
    resampler = options.resampler
    if resampler is None:
        resampler = options.latents is not None or vision.config.num_tokens > _MOST_KEYS
    begin, end = text.settings.get("bos_token_id"), text.settings.get("eos_token_id")
    settings: dict[str, Any] = {
        **text.settings,
        "bos_token_id": tokenizer.bos_token_id if begin is None else begin,
        "eos_token_id": tokenizer.eos_token_id if end is None else end,
        "pad_token_id": tokenizer.pad_token_id,
        "additional_vocab_size": added,
        "cross_layer_interval": interval,
        "qk_layer_norms": options.qk_norm,
        "alpha_type": options.gate[0],
        "alpha_initializer": "zeros" if options.gate[1] == 0 else "ones",
        "freeze_text_layers": True,
        "freeze_vision_layers": True,
        "freeze_lm_head": True,
        "use_resampler": resampler,
        "vision_config": vision.config,
        "perceiver_config": {
            "resampler_n_latents": options.latents or _LATENTS,
            "resampler_n_heads": max(1, round(width / _HEAD_PER_WIDTH)),
            "qk_layer_norms_perceiver": options.qk_norm,
        },
    }
    if text.max_position_embeddings is not None:
        settings["max_position_embeddings"] = text.max_position_embeddings
    return IdeficsConfig(**settings)
