"""A language model as it is read from wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..generation.generation_config import GenerationConfig
from ..tokenizer import IdeficsTokenizer

Tensors = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass
class TextSource:
    """A language model that was found.

    Attributes:
        name: of the source, for messages.
        settings: fields of ``IdeficsConfig``, those of the text side.
        tokenizer: as the source has it.
        tensors: streams its weights by their names in ``IdeficsForVisionText2Text``.
        generation: its makers' settings of generation.
        max_position_embeddings: tokens of its longest texts, as far as known.
        stored: bytes of its weights' files.
    """

    name: str
    settings: dict[str, Any]
    tokenizer: IdeficsTokenizer
    tensors: Tensors
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    max_position_embeddings: int | None = None
    stored: int = 0
