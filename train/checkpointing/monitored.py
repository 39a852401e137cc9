"""The best value of a score so far, which the best checkpoint and early stopping go by; part of every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Scores of which less is better, by the words their names are made of; of all others more is.
_LESS = ("loss", "nll", "perplexity", "z_loss", "padding", "grad_norm", "loss_without_images")


def mode_of(monitor: str, mode: str | None) -> str:
    """``mode`` where it is given; else ``min`` for losses and the like, ``max`` for other scores."""
    return mode or ("min" if set(monitor.split("/")) & set(_LESS) else "max")


@dataclass
class Best:
    """The best value of one score.

    Attributes:
        monitor: the score's name, ``val/loss`` say.
        mode: ``min`` or ``max``.
        value, step: the best and the optimiser step it was found at; None before the first.
        since: how many looks there were after it.
    """

    monitor: str
    mode: str
    value: float | None = None
    step: int | None = None
    since: int = 0

    def look(self, value: float, step: int) -> bool:
        """Take in a value; whether it is better than all before. One that is not finite never is."""
        better = math.isfinite(value) and (
            self.value is None or (value < self.value if self.mode == "min" else value > self.value)
        )
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return dict(vars(self))

    def resume(self, state: Any, step: int) -> bool:
        """Go on from a checkpoint's :meth:`state`, taken at ``step``; False where that is of another score.

        Raises:
            ValueError: it is not what :meth:`state` gives.
        """
        if state is None or (
            isinstance(state, dict) and (state.get("monitor"), state.get("mode")) != (self.monitor, self.mode)
        ):
            return False
        values: dict[str, Any] = state if isinstance(state, dict) else {"since": None}
        value, found, since = (values.get(name) for name in ("value", "step", "since"))
        nothing = value is None and found is None
        known = type(value) is float and math.isfinite(value) and type(found) is int and 0 <= found <= step
        if not (nothing or known) or type(since) is not int or since < 0:
            raise ValueError(
                f"ckpt_path has {state!r} as the best {self.monitor} up to step {step}; give another checkpoint."
            )
        self.value, self.step, self.since = value, found, since
        return True


class Steering:
    """What decides over a run's checkpoints and its end: the best of two scores, and the step they were looked at.

    Attributes:
        checkpoint: of ``callbacks.checkpoint.monitor``; None without one.
        stopping: of ``callbacks.early_stopping.monitor``; None without one.
        looked: the optimiser step of the last look; 0 before the first.
    """

    def __init__(self, checkpoint: Best | None = None, stopping: Best | None = None) -> None:
        self.checkpoint, self.stopping = checkpoint, stopping
        self.looked = 0

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "looked": self.looked,
            "checkpoint": self.checkpoint and self.checkpoint.state(),
            "stopping": self.stopping and self.stopping.state(),
        }

    def resume(self, state: Any, step: int) -> None:
        """Go on from a checkpoint's :meth:`state`, taken at ``step``; one without begins afresh there.

        Raises:
            ValueError: it is not what :meth:`state` gives.
        """
        if state is None:
            self.looked = step
            return
        looked = state.get("looked") if isinstance(state, dict) else None
        if type(looked) is not int or not 0 <= looked <= step:
            raise ValueError(
                f"ckpt_path was validated last at step {looked!r}, expected 0 to {step}; give another checkpoint."
            )
        self.looked = looked
        for name in ("checkpoint", "stopping"):
            best: Best | None = getattr(self, name)
            if best is not None:
                best.resume(state.get(name), step)
