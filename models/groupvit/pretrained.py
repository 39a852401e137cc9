"""Base of the three GroupViT models: which part of a checkpoint each of them takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, cast

from torch import nn

from ..checkpoint import Reader
from ..pretrained import PretrainedModel
from ..trainable import resized_rows
from .tensorflow import read_tf_weights

_ROOTS = ("text_model.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")


class _TextTower(Protocol):
    """What is asked of a text transformer here."""

    config: Any
    embeddings: Any


class GroupViTPreTrainedModel(PretrainedModel):
    """What `GroupViTModel`, `GroupViTTextModel` and `GroupViTVisionModel` share.

    A single tower loads from its own checkpoints and from those of the whole model.
    """

    weight_readers: ClassVar[Mapping[str, Reader]] = {"tf_model.h5": read_tf_weights}
    tower: ClassVar[Literal["both", "text", "vision"]]
    supports_gradient_checkpointing: ClassVar[bool] = True

    @classmethod
    def rename(cls, name: str) -> str | None:
        # Old files keep the position counter as a weight.
        if name.endswith("embeddings.position_ids"):
            return None
        if cls.tower != "both" and name.startswith(_ROOTS) and not name.startswith(f"{cls.tower}_model."):
            return None
        return name

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token table.

        Raises:
            ValueError: the model has no text tower.
        """
        self._text().embeddings.token_embedding = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any
    ) -> nn.Module:
        """Bring the token table to a number of rows; new rows start at the mean of the old ones.

        Args:
            new_num_tokens: rows; None changes nothing but what ``pad_to_multiple_of`` asks for.
            pad_to_multiple_of: round their number up to a multiple of this, for tensor cores.

        Returns:
            The table.

        Raises:
            ValueError: the model has no text tower, or a number is not positive.
        """
        text = self._text()
        table = text.embeddings.token_embedding
        count = table.num_embeddings if new_num_tokens is None else new_num_tokens
        numbers = (count, 1 if pad_to_multiple_of is None else pad_to_multiple_of)
        if any(not isinstance(number, int) or number < 1 for number in numbers):
            raise ValueError(
                f"resize_token_embeddings was given {new_num_tokens} rows and pad_to_multiple_of={pad_to_multiple_of}; "
                "give positive integers."
            )
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count != table.num_embeddings:
            weight = resized_rows(table.weight, table.weight, count)
            table.weight = weight.requires_grad_(table.weight.requires_grad)
            table.num_embeddings = text.config.vocab_size = count
        return table

    def _text(self) -> _TextTower:
        if self.tower == "vision":
            raise ValueError(f"{type(self).__name__} has no token table; it takes images alone.")
        return cast(_TextTower, self.text_model)
