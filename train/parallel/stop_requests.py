"""Being asked to stop: what this process was asked, and what all ranks agreed on."""

from __future__ import annotations

from dataclasses import dataclass

# The larger wins where ranks were asked for different things: a scheduler's word over that of a terminal.
INTERRUPT, STOP, REQUEUE = 1, 2, 3


@dataclass
class StopRequests:
    """Made by ``fit`` and shared by whoever is asked (signal handlers) and whoever heeds it (the training step).

    Attributes:
        asked: the largest request this process got; 0 without one. Handlers write it.
        agreed: the largest over all ranks as of the last step, hence the same on each. The training step writes it.
    """

    asked: int = 0
    agreed: int = 0

    def ask(self, request: int) -> None:
        self.asked = max(self.asked, request)
