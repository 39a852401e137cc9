"""Checkpoints of IDEFICS: what older files hold beside the weights, and a model or its decoder from either's
file.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..pretrained import PretrainedModel
from .configuration import IdeficsConfig

# Tables that earlier releases of Transformers stored and that follow from the configuration.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


class IdeficsPreTrainedModel(PretrainedModel):
    """What ``IdeficsModel`` and ``IdeficsForVisionText2Text`` share."""

    config_class = IdeficsConfig
    config: IdeficsConfig
    prefix: ClassVar[str] = ""

    @classmethod
    def rename(cls, name: str) -> str | None:
        return None if name.endswith(_COMPUTED) else name

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> Self:
        """Load a folder in the format of Transformers, or a hub id, in evaluation mode.

        Weights are read one at a time onto ``device`` in ``dtype``; the model is never in memory twice.

        Args:
            path: a folder with ``config.json`` and weights (sharded or not), or ``owner/name`` on the hub.
            dtype: type of the weights; the file's by default. ``torch_dtype`` is its older name.
            options: ``device``, ``config``, ``revision``, ``cache_dir``, ``token``, ``local_files_only``.

        Raises:
            ValueError: there is no such checkpoint, it is damaged, or its weights do not fit (listed).
        """
        return super().from_pretrained(path, dtype=dtype if dtype is not None else torch_dtype, **options)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of weights, shared ones counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


def resized_rows(old: Tensor | None, base: Tensor, count: int) -> nn.Parameter:
    """Rows [count, C] that keep those of ``old``; further ones start at the mean of the ``base`` rows."""
    with torch.no_grad():
        rows = base.float().mean(0).to(base.dtype).repeat(count, 1)
        if old is not None:
            kept = min(count, len(old))
            rows[:kept] = old[:kept]
    return nn.Parameter(rows)
