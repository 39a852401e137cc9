"""Token tables in two parts: the base model's, which may be frozen, and the added tokens', always trained.

Legend: B batch, T tokens, C hidden size, V base tokens, A added tokens, M rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .loss import LossSums, language_model_loss


class IdeficsDecoupledEmbedding(nn.Embedding):
    """Ids [B, T] to vectors [B, T, C]; ids from V on are looked up in ``additional_embedding``.

    It is an ``nn.Embedding`` of V + A tokens to whoever asks (an adapter of it has rows for all of them), whose
    ``weight`` holds the first V.
    """

    weight: nn.Parameter

    def __init__(
        self, num_embeddings: int, num_additional_embeddings: int, embedding_dim: int, partially_freeze: bool
    ) -> None:
        # Given a table, the parent draws none.
        super().__init__(num_embeddings, embedding_dim, _weight=torch.empty(num_embeddings, embedding_dim))
        self.num_base_embeddings, self.num_additional_embeddings = num_embeddings, num_additional_embeddings
        self.num_embeddings = num_embeddings + num_additional_embeddings
        if partially_freeze:
            self.weight.requires_grad_(False)
        self.additional_embedding: nn.Embedding | None = None
        if num_additional_embeddings:
            self.additional_embedding = nn.Embedding(num_additional_embeddings, embedding_dim)

    def resize(self, rows: nn.Parameter) -> None:
        """Take ``rows`` [A, C] as the added tokens' table."""
        self.num_additional_embeddings = len(rows)
        self.num_embeddings = self.num_base_embeddings + len(rows)
        self.additional_embedding = None
        if len(rows):
            self.additional_embedding = nn.Embedding(len(rows), rows.shape[1], device="meta")
            self.additional_embedding.weight = rows

    def merge(self) -> None:
        """Append the added tokens' rows to the base table."""
        if self.additional_embedding is None:
            return
        rows = torch.cat((self.weight, self.additional_embedding.weight)).detach()
        self.weight = nn.Parameter(rows, self.weight.requires_grad)
        self.num_embeddings = self.num_base_embeddings = len(rows)
        self.num_additional_embeddings = 0
        self.additional_embedding = None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.additional_embedding is None:
            return F.embedding(input_ids, self.weight)
        first = self.num_base_embeddings
        base = F.embedding(input_ids.clamp(max=first - 1), self.weight)
        extra = (input_ids - first).clamp(min=0)
        return torch.where((input_ids >= first)[..., None], self.additional_embedding(extra), base)

    def extra_repr(self) -> str:
        return f"{self.num_base_embeddings} + {self.num_additional_embeddings}, {self.weight.shape[1]}"


class IdeficsDecoupledLinear(nn.Module):
    """The head: hidden states [..., C] to logits [..., V + A], or with labels to the sums of the loss."""

    def __init__(
        self, in_features: int, out_features: int, out_additional_features: int, partially_freeze: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.out_additional_features = out_additional_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if partially_freeze:
            self.weight.requires_grad_(False)
        self.additional_fc: nn.Linear | None = None
        if out_additional_features:
            self.additional_fc = nn.Linear(in_features, out_additional_features, bias=False)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        z_loss_exclude: Tensor | None = None,
        loss_groups: Tensor | None = None,
        want_z: bool = True,
    ) -> Tensor | LossSums:
        """Logits of ``hidden``; or, given ``labels`` int64 [M] of hidden [M, C], the summed losses.

        The losses come from the head's own forward so that sharding wrappers see its parameters in use.
        """
        if labels is not None:
            return language_model_loss(
                hidden, self.full_weight(), labels, z_loss_exclude, loss_groups, want_z
            )
        logits = F.linear(hidden, self.weight)
        if self.additional_fc is None:
            return logits
        return torch.cat((logits, self.additional_fc(hidden)), dim=-1)

    def resize(self, rows: nn.Parameter) -> None:
        """Take ``rows`` [A, C] as the added tokens' rows."""
        self.out_additional_features = len(rows)
        self.additional_fc = None
        if len(rows):
            self.additional_fc = nn.Linear(self.in_features, len(rows), bias=False, device="meta")
            self.additional_fc.weight = rows

    def merge(self) -> None:
        """Append the added tokens' rows to the base rows."""
        if self.additional_fc is None:
            return
        self.weight = nn.Parameter(self.full_weight().detach(), self.weight.requires_grad)
        self.out_features, self.out_additional_features = len(self.weight), 0
        self.additional_fc = None

    def full_weight(self) -> Tensor:
        """Base and added rows [V + A, C]."""
        if self.additional_fc is None:
            return self.weight
        return torch.cat((self.weight, self.additional_fc.weight))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features} + {self.out_additional_features}"
