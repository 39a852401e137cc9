"""What ``generate`` keeps of its steps."""

from __future__ import annotations

from torch import Tensor


class Trace:
    """Scores and logits of the steps, where they are asked for."""

    def __init__(self, keep_scores: bool, keep_logits: bool) -> None:
        self.keep_scores, self.keep_logits = keep_scores, keep_logits
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def add(self, scores: Tensor, logits: Tensor) -> None:
        if self.keep_scores:
            self.scores.append(scores.clone())
        if self.keep_logits:
            self.logits.append(logits.clone())

    def collected(self) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        return (
            tuple(self.scores) if self.keep_scores else None,
            tuple(self.logits) if self.keep_logits else None,
        )
