"""A run that begins from a language model and an image tower: ``model.init_text`` and ``model.init_vision``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ....models.idefics import IdeficsTokenizer
from ....models.idefics.composition.compose import ComposeOptions, Composition
from ....models.idefics.prompt import END_OF_UTTERANCE

if TYPE_CHECKING:
    from .config import IdeficsTrainConfig


def composition_of(config: IdeficsTrainConfig, *, tokenizer: str | None = None, seed: int = 0) -> Composition:
    """The two sources of a run, joined as its configuration says; the language model's weights are not read yet.

    Args:
        config: the group ``model`` of the run.
        tokenizer: folder of the tokenizer that the documents were made with, to be compared.
        seed: what new weights are drawn from.

    Raises:
        ValueError: there is one source without the other, or beside ``model.init_checkpoint``; as the sources; or the
            documents' tokenizer is another.
    """
    text, vision = config.init_text, config.init_vision
    if text is None or vision is None:
        given, missing = ("text", "vision") if vision is None else ("vision", "text")
        raise ValueError(
            f"model.init_{given} is given without model.init_{missing}; a run composes its model of both."
        )
    if config.init_checkpoint is not None:
        raise ValueError(
            f"model.init_checkpoint={config.init_checkpoint} and model.init_text={text} are both given; begin from a "
            "whole model or compose one."
        )
    documents = None
    if tokenizer is not None and Path(tokenizer).is_dir():  # what is not there is said where it is needed
        documents = IdeficsTokenizer.from_pretrained(tokenizer)
    shape = config.config
    options = ComposeOptions(
        cross_layer_interval=shape.cross_layer_interval,
        resampler=shape.use_resampler,
        latents=shape.perceiver_config.resampler_n_latents if shape.use_resampler else None,
        alpha=shape.alpha_type,
        qk_norm=shape.qk_layer_norms,
        end_of_utterance=documents is not None and documents.find(END_OF_UTTERANCE) is not None,
        seed=seed,
    )
    composed = Composition.of(text, vision, options)
    if documents is not None:
        _check_tokenizer(composed, documents, str(tokenizer))
    return composed


def _check_tokenizer(composed: Composition, found: IdeficsTokenizer, source: str) -> None:
    own = composed.processor.tokenizer
    if found.get_vocab() != own.get_vocab():
        raise ValueError(
            f"data.tokenizer={source} is not the tokenizer of model.init_text={composed.text.name} with the tokens of "
            f"pictures (<image> is {found.find('<image>')}, expected {own.find('<image>')}); make the shards with the "
            "one that `interloom compose` writes of the same sources."
        )
