"""SigLIP's image tower (Zhai et al. 2023), and SigLIP 2's of fixed resolution.

A plain vision transformer without a class token: patches with a bias, learnt positions, and a last norm after which
the language model reads. The attention pooling of its contrastive head is not part of it.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..vision import IdeficsVisionEmbeddings, IdeficsVisionTransformer


class IdeficsSiglipEmbeddings(IdeficsVisionEmbeddings):
    """Patches and positions."""

    def interpolate(self, square: Tensor, rows: int, columns: int) -> Tensor:
        return F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)


class IdeficsSiglipTransformer(IdeficsVisionTransformer):
    """Images [N, 3, height, width] to patches [N, S, E]; ``pooler_output`` is their mean."""

    embeddings_class: ClassVar[type[IdeficsVisionEmbeddings]] = IdeficsSiglipEmbeddings
    pre_norm: ClassVar[bool] = False
    normed_output: ClassVar[bool] = True

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1)
